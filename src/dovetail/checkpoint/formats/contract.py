"""The contract of a format to which a quantized model is written without quantizing it anew.

A format says which grids it holds (`kind`), writes the codes and scales of one in its own layout (`encode`), and reads
them with the decoder of the format's owner (`decode`): its values must equal those of `QuantizedWeight.dequantize`.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.errors import ExportError


class Format(ABC):
    """A format of a Hugging Face folder: tensors beside the name of each layer, and a "quantization_config"."""

    name: ClassVar[str]
    package: ClassVar[str]
    """The package of the format's owner, which decodes what is written."""
    decoder: ClassVar[str]
    """The function of that package."""

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
        """Return the "quantization_config" of config.json.

        layers   path -> weight of the quantized layers
        outside  paths of the linear layers that are not quantized
        """

    def notes(self, layers: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> list[str]:
        """Return what a reader of the report must know."""
        return []

    def refused(self, where: str, quantized: QuantizedWeight, rule: str, fix: str) -> ExportError:
        """Return the error for a grid that the format does not hold."""
        return ExportError(f"export to {self.name}: {where}", found=quantized.identity, rule=rule, fix=fix)
