"""Quantizers: methods that put a weight on a grid (`dovetail.chains.grid`), one file each."""

from dovetail.links.quantize import block_float4, fp8, gptq, hqq, integer, keep, nf
