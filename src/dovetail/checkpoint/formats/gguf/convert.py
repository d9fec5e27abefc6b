"""A file to be like, made by the converter of the user's own checkout of llama.cpp, for other families."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.attach import stock_in_place
from dovetail.errors import ExportError
from dovetail.models.layouts import LinearLayout, layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def converted(
    checkout: Path,
    scratch: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    layers: Mapping[str, QuantizedWeight],
    others: Mapping[str, Tensor],
) -> Path:
    """Write a model as a stock checkpoint, run `convert_hf_to_gguf.py` of a checkout on it, and return its file.

    scratch  an empty folder for the checkpoint, dense, and for the file
    others   path -> tensor of the model that is not quantized
    errors   ExportError where there is no such script, or it fails
    """
    script, where = checkout / "convert_hf_to_gguf.py", "export to gguf: the converter"
    if not script.is_file():
        rule, fix = "a checkout of llama.cpp must have its converter", "clone llama.cpp, and name its folder"
        raise ExportError(where, found=f"no file {script}", rule=rule, fix=fix)
    with stock_in_place(model):
        modules = dict(model.named_modules())
        layouts = {name: layout_of(name, modules[name]) for name in layers if name in modules}
    dense = {
        f"{name}.weight": layouts.get(name, LinearLayout(*quantized.shape)).native(
            quantized.dequantize(torch.empty(quantized.shape, dtype=model.dtype))
        )
        for name, quantized in layers.items()
    }
    tensors = {key: tensor.contiguous() for key, tensor in {**others, **dense}.items()}
    save_file(tensors, scratch / "model.safetensors", {"format": "pt"})
    config: Any = type(model.config).from_dict(model.config.to_dict())
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    for key in ("quantization_config", "dovetail"):
        vars(config).pop(key, None)
    config.save_pretrained(scratch)
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    made = scratch / "like.gguf"
    command = [sys.executable, str(script), str(scratch), "--outfile", str(made), "--outtype", _TYPES[model.dtype]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not made.is_file():
        said = " ".join(done.stderr.split())[-300:]
        rule, fix = "the converter must write a file of the model", "run it by hand, and name its file with --like FILE"
        raise ExportError(where, found=f"exit code {done.returncode}: {said}", rule=rule, fix=fix)
    return made
