"""Names of dtypes: those of torch, for configurations and headers, and those of safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dovetail.errors import LoadError

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""The dtypes that the parameters of a model can have, by their names in torch."""

STORED_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The same dtypes by their names in a safetensors file."""

STORED = STORED_FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that a packed model can have, by their names in a safetensors file."""


def shape_of(
    where: str, file: Any, key: str, known: Mapping[str, torch.dtype] = STORED
) -> tuple[torch.Size, torch.dtype]:
    """Return shape and dtype of a tensor of an open file, without reading it; raise LoadError for an unknown dtype."""
    part = file.get_slice(key)
    if (dtype := known.get(part.get_dtype())) is None:
        found, rule = f"{key[:200]} of dtype {part.get_dtype()}", f"the dtype must be one of {', '.join(known)}"
        raise LoadError(where, found=found, rule=rule, fix="store the tensor in one of these dtypes")
    return torch.Size(part.get_shape()), dtype
