"""How many tokens a row may have.

A config says it for some models only: RoBERTa's table of positions has two rows more than its longest text, MPT calls
the limit `max_seq_len`, and LED has one for the encoder and one for the decoder. Running the model on one row, without
the matrix products, is cheap and shows the limit of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dovetail.tasks.task import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = 16
"""Special tokens and tokens beyond an answer that a row has, at most."""


def length_limit(model: nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: int, records: Sequence[Record]) -> int:
    """Return `wanted` tokens, or fewer where the tokenizer or the model has a smaller limit.

    records   what rows are made of. Where the config's limit is larger than the model's, a row as long as theirs can be
              is tried; records are not tokenized for it: a token stands for a byte or more
    """
    from transformers import PreTrainedModel

    positions = getattr(model.config, "max_position_embeddings", None) or wanted  # XLNet says -1 for no limit
    limit = min(wanted, tokenizer.model_max_length, positions if positions > 0 else wanted)
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids" or model.device.type == "meta":
        return limit
    widths = _widths(records)
    if "messages" in widths:
        widths["messages"] = limit  # a template adds to the texts
    target = max([width for name, width in widths.items() if name != "prompt"], default=0) + _MARKS
    high = min(limit, sum(widths.values()) + _MARKS)
    if _fits(model, high, target) or not _fits(model, low := min(2, high), target):
        return limit  # or no length fits, and what is wrong is something else
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(model, middle, target) else (low, middle)
    return low


def _widths(records: Sequence[Record]) -> dict[str, int]:
    """Return the bytes of the longest text of each field."""
    widths: dict[str, int] = {}
    for record in records:
        for name, value in record.items():
            if name == "messages":
                widths[name] = 0
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    widths[name] = max(widths.get(name, 0), len(text.encode()))
    return widths


@torch.no_grad()
def _fits(model: Any, length: int, target: int) -> bool:
    """Return whether the model takes a row of `length` tokens, and an answer of up to `target` in a decoder."""
    token = 0 if getattr(model.config, "pad_token_id", None) != 0 else 1  # positions may leave out padding
    ids = torch.full((1, length), token, device=model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :target]
    try:
        with in_evaluation(model), _Skimming():
            model(**batch)
    except torch.OutOfMemoryError:
        return True
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


class _Skimming(TorchFunctionMode):
    """Leaves out the products of matrices, and checks look-ups in tables first: a GPU would end the process."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first, second, third = [*args, None, None, None][:3]
        if func is F.linear and isinstance(second, Tensor):
            return first.new_zeros(*first.shape[:-1], second.shape[0])
        if func is F.scaled_dot_product_attention and isinstance(third, Tensor):
            return first.new_zeros(*first.shape[:-1], third.shape[-1])
        if func is torch.embedding and int(second.max()) >= first.shape[0]:
            raise IndexError
        return func(*args, **kwargs)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and restore the mode of every module at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
