"""What GPTQ and AWQ checkpoints share: float16 scales, integer zero points, and gptqmodel as the owner.

gptqmodel decodes what is written where it is installed. It requires a newer torch than Dovetail does, and changes
`safetensors` and transformers when it is imported; without it Dovetail reads its own bytes back, and says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.checkpoint.formats.contract import Format
from dovetail.links.quantize.affine import AffineWeight


class GPTQModelFormat(Format):
    """A format that gptqmodel decodes, or Dovetail where it is not installed."""

    package = "gptqmodel"
    dtypes = ("float16", "bfloat16")

    def __init__(self, name: str, decoder: str) -> None:
        """Name the format, and the function of gptqmodel that decodes it."""
        self.name = name
        self.decoder = (
            decoder if installed() else "dovetail, which reads its own bytes back (gptqmodel is not installed)"
        )

    def check_package(self) -> None:
        """Accept an environment without gptqmodel: `decoder` says who read the bytes."""

    def scales_and_zeros(self, quantized: AffineWeight, group: int) -> tuple[Tensor, Tensor]:
        """Return float16 scales and uint8 zero points (o, i / group), repeated where the grid's groups are larger.

        Raises ExportError for scales that float16 does not hold.
        """
        o, repeats = quantized.shape[0], quantized.block // group
        scale_og = quantized.block_scales().view(o, -1).repeat_interleave(repeats, dim=1)
        narrow = scale_og.to(torch.float16)
        if not torch.equal(narrow.float(), scale_og):
            rule, fix = "scales must be float16 numbers", "use a quantizer with float16 scales, such as int(bits=4)"
            raise self.refused(self.name, quantized, rule, fix)
        return narrow, quantized.zero_points().repeat_interleave(repeats, dim=1)

    def notes(self, layers: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> list[str]:
        if installed():
            return []
        return ["install gptqmodel and run `dovetail verify` to have its owner decode the folder"]


def installed() -> bool:
    """Return whether gptqmodel is installed."""
    return importlib.util.find_spec("gptqmodel") is not None
