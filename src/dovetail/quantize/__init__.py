"""Quantizers: methods that put a weight on a grid (`storage`), one file each; importing this registers them."""

from dovetail.quantize import fp8, gptq, nf, rtn

__all__ = ["fp8", "gptq", "nf", "rtn"]
