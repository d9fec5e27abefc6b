"""`keep`: the grid that a quantized file or checkpoint has already. Nothing is quantized.

    keep >> lora(r=16) >> regrid

Idea: a model that was downloaded quantized (`dovetail.load("model.gguf", grid="keep")`) has codes, scales and offsets
of its own. An adapter is trained over them, `regrid` holds the weights on them, and merging changes codes alone: the
result can be written in the same file format without a second quantization.

Each layer keeps the grid that it has. The layers of one file may differ: in a Q4_K_M file they are Q4_K, Q5_0, Q6_K and
Q8_0. A layer's identity names its format: `keep(format="Q4_K")`. `dovetail.links.quantize.ggml` describes the formats,
their bits per weight, and which of them hold zero exactly; a pruner in the chain is refused on the others.

Source: the block formats of ggml, llama.cpp's library.
Trade-off: a grid that was made without the task's data or a search stays as it is; `gptq` on the original model has the
smaller error, but needs that model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NoReturn

from torch import Tensor

from dovetail.chains.link import Quantizer, Site, identity_of
from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics
from dovetail.errors import ChainError
from dovetail.links.quantize.ggml import BLOCK_FORMATS, BlockWeight


@register("keep")
@dataclass(frozen=True)
class Keep(Quantizer):
    """The grid that the layer has already.

    format  name of a layer's grid, such as Q4_K; none in a chain, which keeps whatever grid a layer has
    """

    format: str | None = None

    continues: ClassVar[bool] = True
    summary: ClassVar[str] = "the grid of a quantized file or checkpoint; only codes change"
    source: ClassVar[str] = "ggml's block formats"

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in BLOCK_FORMATS:
            rule = f"format must be none or one of {', '.join(BLOCK_FORMATS)}"
            raise self._bad(f"format={self.format[:60]}", rule, "write keep without arguments")

    @property
    def has_zero(self) -> bool:
        return self.format is None or BLOCK_FORMATS[self.format].has_zero

    def check(self, site: Site) -> None:
        """Raise ChainError where the blocks of the format do not divide the layer's inputs."""
        if self.format is not None and site.in_features % (block := BLOCK_FORMATS[self.format].block):
            raise ChainError(
                f"{self} at {site.name}",
                found=f"in_features={site.in_features}",
                rule=f"a row of {self.format} must have a multiple of {block} weights",
                fix="load the file that the layer came from again",
            )

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> NoReturn:
        """Raise ChainError: a dense weight has no grid to keep."""
        raise ChainError(
            self.name,
            found="a dense weight",
            rule="keep keeps the grid that a layer has already",
            fix='load a quantized file with grid="keep", or use a quantizer such as int(bits=4)',
        )

    def empty(self, shape: tuple[int, int]) -> BlockWeight:
        if self.format is None:
            rule = "storage is made for one format"
            raise self._bad("no format", rule, f"name the format, such as keep(format={next(iter(BLOCK_FORMATS))})")
        return BlockWeight.empty(shape, BLOCK_FORMATS[self.format], identity_of(self))
