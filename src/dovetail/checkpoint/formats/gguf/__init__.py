"""GGUF files, the format of llama.cpp: read as models that are dequantized."""

from dovetail.checkpoint.formats.gguf.header import Header
from dovetail.checkpoint.formats.gguf.read import (
    checked_header,
    forget_gguf,
    gguf_config,
    gguf_tokenizer,
    warn_of_unread,
)

__all__ = ["Header", "checked_header", "forget_gguf", "gguf_config", "gguf_tokenizer", "warn_of_unread"]
