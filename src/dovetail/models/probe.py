"""A small batch that a model takes, made from its configuration and a seed: what to compare outputs on without data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAVE_SAMPLES = 8000
"""Half a second at 16 kHz, more than the convolutions of speech encoders need."""


def probe_batch(model: PreTrainedModel, *, rows: int = 4, tokens: int = 16, seed: int = 0) -> dict[str, Tensor] | None:
    """Make a batch of keyword arguments for a model, on its device, without padding.

    rows, tokens  of token ids; images and sounds have the size that the config states
    seed          of the values
    returns       input_ids and attention_mask (rows, tokens) int64, or the model's pixel_values, input_features or
                  input_values in its dtype, with decoder_input_ids for an encoder-decoder; None where the main input
                  is another, or where the config does not state its size
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    vocabulary: int | None = getattr(config.get_text_config(), "vocab_size", None)
    padding = getattr(config, "pad_token_id", None)

    def ids(high: int, width: int) -> Tensor:
        drawn = torch.randint(high, (rows, width), generator=generator)
        # No padding in the middle: some models derive positions from it.
        drawn[drawn == padding] = 0 if padding != 0 else 1
        return drawn

    if model.main_input_name == "input_ids":
        if vocabulary is None:
            return None
        batch = {"input_ids": ids(vocabulary, tokens)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    else:
        shape = _input_shape(model.main_input_name, config)
        if shape is None:
            return None
        batch = {model.main_input_name: torch.randn(rows, *shape, generator=generator).to(model.dtype)}
    if config.is_encoder_decoder and vocabulary is not None:
        batch["decoder_input_ids"] = ids(vocabulary, tokens // 2)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _input_shape(name: str, config: Any) -> tuple[int, ...] | None:
    """Return the shape of one image or sound; None where the config does not state it."""
    if name == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is None:
            return None
        return (channels, size, size) if isinstance(size, int) else (channels, *size)
    if name == "input_features":
        mels, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
        return None if mels is None or positions is None else (mels, 2 * positions)  # the encoder halves the frames
    return (WAVE_SAMPLES,) if name == "input_values" else None
