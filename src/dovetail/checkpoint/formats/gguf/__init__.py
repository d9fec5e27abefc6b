"""GGUF files, the format of llama.cpp: read as models that are dequantized, or that keep the grid of the file."""

from dovetail.checkpoint.formats.gguf.header import Header
from dovetail.checkpoint.formats.gguf.keep import keep_note, kept_tensors, load_kept
from dovetail.checkpoint.formats.gguf.read import (
    checked_header,
    forget_gguf,
    gguf_config,
    gguf_tokenizer,
    warn_of_unread,
)

__all__ = [
    "Header",
    "checked_header",
    "forget_gguf",
    "gguf_config",
    "gguf_tokenizer",
    "keep_note",
    "kept_tensors",
    "load_kept",
    "warn_of_unread",
]
