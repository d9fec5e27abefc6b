"""Configuration and tokenizer of a GGUF file, as transformers converts them; what a loaded model must forget.

transformers reads a GGUF file with `from_pretrained(folder, gguf_file=...)`: it renames and dequantizes the tensors, in
float32, and makes the configuration and the tokenizer from the metadata. `dovetail.load` checks the file first.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint.formats.gguf.header import Header, read_header
from dovetail.errors import ConversionWarning, LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def checked_header(path: Path) -> Header:
    """Return the header of a GGUF file; LoadError for a damaged file, or without the gguf package."""
    if importlib.util.find_spec("gguf") is None:
        rule, fix = "a GGUF file is read with the gguf package", "pip install gguf, or dovetail[gemma]"
        raise LoadError(f"model {path}", found="no package gguf installed", rule=rule, fix=fix)
    return read_header(path)


def gguf_config(header: Header) -> PreTrainedConfig:
    """Return the model's configuration; no weight is read. Raises what transformers raises for an unknown model."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        path.write_bytes(header.without_data())
        config: Any = AutoConfig.from_pretrained(folder, gguf_file=str(path))
    embedding = header.shapes.get("token_embd.weight")
    if embedding is not None:
        config.vocab_size = embedding[0]
    config.name_or_path = str(header.path)
    return config


def warn_of_unread(header: Header) -> None:
    """Warn of scaled positions, which transformers does not convert: the model computes other numbers than llama.cpp.

    A scaling is in the metadata (Gemma 3 of 4 B and more) or in tensors of factors (Llama 3.1, Phi-3 of 128k tokens).
    """
    prefix = f"{header.architecture}.rope.scaling."
    keys = [key for key in header.metadata if key.startswith(prefix) and header.architecture != "gpt-oss"]
    if keys and header.metadata.get(f"{prefix}type") == "none":
        keys = []
    if found := [*keys, *(name for name in header.shapes if name.startswith("rope_f"))]:
        text = f"{header.path}: transformers does not read {', '.join(found)}: positions are not scaled as in the file"
        warnings.warn(text, ConversionWarning, stacklevel=3)


def gguf_tokenizer(header: Header, model_type: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with the chat template of the file."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    # With the type given, transformers does not read the whole file for the configuration again.
    known = model_type if TOKENIZER_MAPPING_NAMES.get(model_type) else None
    return AutoTokenizer.from_pretrained(header.path.parent, gguf_file=str(header.path), tokenizer_type=known)


def forget_gguf(model: PreTrainedModel) -> None:
    """Make a dequantized model an ordinary one, which saves an ordinary checkpoint.

    transformers leaves GGUF's quantizer on it, and a saved config.json would say that the weights are in blocks.
    """
    loaded: Any = model
    loaded.hf_quantizer.remove_quantization_config(model)
    del loaded.is_quantized
    vars(model.config).pop("_is_quantized", None)
