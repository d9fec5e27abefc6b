"""Names of dtypes: those of torch, for configurations and headers, and those of safetensors files."""

from __future__ import annotations

import torch

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""The dtypes that the parameters of a model can have, by their names in torch."""

STORED_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The same dtypes by their names in a safetensors file."""

STORED = STORED_FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that a packed model can have, by their names in a safetensors file."""
