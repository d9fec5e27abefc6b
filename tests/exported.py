"""What the tests of export formats share: a merged tiny model, and a skip where a format's package is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import dovetail
from dovetail.checkpoint.exportable import FORMATS
from dovetail.errors import ExportError
from families import batch, make, move


def merged(
    text: str, family: str = "llama", *, packed: bool = True, dtype: torch.dtype = torch.float32, **given: Any
) -> PreTrainedModel:
    """A tiny model, quantized, tuned on the grid and merged."""
    model: Any = make(family)
    model.to(dtype)
    closed = "remask >> regrid" if "wanda" in text else "regrid"
    dovetail.apply(model, f"{text} >> lora(r=4) >> {closed}", calibration=[batch(model, seed=4)], **given)
    move(model)
    dovetail.merge(model, packed=packed)
    return model


def available(name: str) -> None:
    """Skip the test where the package of a format is not installed."""
    try:
        FORMATS[name].check_package()
    except ExportError as error:
        pytest.skip(error.found)
