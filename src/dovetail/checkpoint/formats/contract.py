"""The contract of a format to which a quantized model is written without quantizing it anew.

A format says which grids it holds (`kind`), writes the codes and scales of one in its own layout (`encode`), and reads
them with the decoder of the format's owner (`decode`): its values must equal those of `QuantizedWeight.dequantize`.
`export` compares while it writes. `dovetail.checkpoint.verify` does it again on the written folder: it reads a layer
with `written`, compares it with what `encode` gives, decodes it with `decode`, and loads the folder in transformers
with `stock_arguments`. A format of other files than a Hugging Face folder's overrides `written` and `others`.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer
from dovetail.errors import ExportError
from dovetail.files import open_tensors
from dovetail.links.quantize.affine import AffineWeight
from dovetail.models.dtypes import FLOATS
from dovetail.models.layouts import Layout, LinearLayout

WEIGHTS = "model.safetensors"


class Format(ABC):
    """A format of a Hugging Face folder: tensors beside the name of each layer, and a "quantization_config"."""

    name: str
    package: str
    """The package of the format's owner, which decodes what is written."""
    decoder: str
    """The function of that package."""
    dtypes: tuple[str, ...] = tuple(FLOATS)
    """The dtypes that a model can be served in."""
    dense: bool = False
    """Whether transformers computes with the decoded weights themselves, so that equal values give equal logits."""
    layouts: tuple[type[Layout], ...] = (LinearLayout,)
    """The kinds of layers that it holds."""

    def check_package(self) -> None:
        """Raise ExportError where the owner's package is not installed."""
        if importlib.util.find_spec(self.package.replace("-", "_")) is None:
            raise ExportError(
                f"export to {self.name}",
                found=f"no package {self.package} installed",
                rule="every tensor that is written is decoded by the format's owner and compared",
                fix=f"pip install {self.package}",
            )

    @abstractmethod
    def kind(self, where: str, quantized: QuantizedWeight) -> str:
        """Return what the format calls this grid, from its form alone (no values are read).

        Raises ExportError, with a quantizer to use instead, for a grid that the format does not hold.
        """

    def check_experts(self, where: str, grids: Sequence[QuantizedWeight]) -> None:
        """Raise ExportError for MoE experts, or for grids of them that the format does not hold in one module."""
        rule, fix = "the format holds layers of nn.Linear, not MoE experts", 'exclude the experts with "!*experts*"'
        raise self.refused(where, grids[0], rule, fix)

    @abstractmethod
    def encode(self, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of a layer by the part of their name after the layer's: "weight", "weight_scale".

        dtype  that the model is served in
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        """Return the values (o, i) that the owner's decoder gives for `encode`'s tensors, served in `dtype`."""

    @abstractmethod
    def config(
        self, layers: Mapping[str, QuantizedWeight], outside: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the fields of config.json by name: "quantization_config", and others that engines read.

        layers   path -> weight of the quantized layers
        outside  paths of the linear layers that are not quantized
        """

    def written(self, folder: Path, name: str) -> dict[str, Tensor]:
        """Return the tensors of a layer in a written folder, by name as `encode` returns them."""
        with open_tensors(folder / WEIGHTS, owner="an exported folder") as file:
            keys = [key for key in file.keys() if _is_part(key, {name})]  # noqa: SIM118 (not a dict)
            return {key.removeprefix(f"{name}."): file.get_tensor(key) for key in keys}

    def others(self, folder: Path, layers: Collection[str]) -> dict[str, Tensor]:
        """Return the tensors of a written folder that belong to none of these quantized layers, by name."""
        with open_tensors(folder / WEIGHTS, owner="an exported folder") as file:
            keys = [key for key in file.keys() if not _is_part(key, layers)]  # noqa: SIM118 (not a dict)
            return {key: file.get_tensor(key) for key in keys}

    def grid(
        self, parts: Mapping[str, Tensor], get: Callable[[str], Tensor], shape: tuple[int, int]
    ) -> Quantizer | None:
        """Return the quantizer whose grid a layer of a checkpoint in this format has; None for a dense layer.

        parts   the stored tensors of the layer by name, without values (device "meta")
        get     reads one of them
        shape   (out, in) of the layer
        errors  LoadError for a grid that no quantizer of Dovetail has
        """
        return None

    def read(self, tensors: Mapping[str, Tensor], empty: QuantizedWeight) -> QuantizedWeight:
        """Return the weight that `encode` wrote as these tensors.

        empty   the storage of `grid`'s quantizer; the caller compares what `encode` makes of the result
        errors  LoadError for tensors that do not describe it
        """
        raise NotImplementedError(f"{self.name} is not read")

    def stock_arguments(self, layers: Mapping[str, QuantizedWeight]) -> dict[str, Any] | None:
        """Return the arguments of `from_pretrained` with which transformers loads the folder; None if it does not."""
        return None

    def notes(self, layers: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> list[str]:
        """Return what a reader of the report must know."""
        return []

    def one_grid(self, where: str, grids: Sequence[QuantizedWeight]) -> None:
        """Raise ExportError where the experts of a module are on several grids."""
        kinds = {self.kind(where, quantized): quantized for quantized in grids}
        if len(kinds) > 1:
            rule = f"the experts of a module must be on one grid, and these are on {', '.join(kinds)}"
            raise self.refused(where, list(kinds.values())[1], rule, "use one quantizer for all experts of the module")

    def affine(self, where: str, quantized: QuantizedWeight) -> AffineWeight:
        """Return the weight if it is of integers with integer zero points or none. Raises ExportError for others."""
        fix = "use int(bits=4, group=32, symmetric=signed, scale_bits=7)"
        if not isinstance(quantized, AffineWeight):
            raise self.refused(where, quantized, "the format holds integers with a scale per group", fix)
        if quantized.zero_og is not None and quantized.zero_og.is_floating_point():
            raise self.refused(where, quantized, "zero points must be integers", "use hqq(zero=exact), or int(bits=4)")
        return quantized

    def refused(self, where: str, quantized: QuantizedWeight, rule: str, fix: str) -> ExportError:
        """Return the error for a grid that the format does not hold."""
        return ExportError(f"export to {self.name}: {where}", found=quantized.identity, rule=rule, fix=fix)


def _is_part(key: str, layers: Collection[str]) -> bool:
    """Return whether a tensor is a part of the quantized weight of one of these layers."""
    parts = key.split(".")
    return parts[-1] != "bias" and any(".".join(parts[:end]) in layers for end in range(1, len(parts)))
