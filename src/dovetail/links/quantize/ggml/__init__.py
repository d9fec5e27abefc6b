"""The formats of GGUF files as grids: the blocks of a file with their exact bits."""

from __future__ import annotations

from collections.abc import Mapping

from dovetail.links.quantize.ggml.blocks import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from dovetail.links.quantize.ggml.tables import IQ4_NL, IQ4_XS, MXFP4
from dovetail.links.quantize.ggml.two_level import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from dovetail.links.quantize.ggml.weight import BlockFormat, BlockWeight

BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    form.name: form for form in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4)
}
"""Name in llama.cpp -> format."""

__all__ = ["BLOCK_FORMATS", "BlockFormat", "BlockWeight"]
