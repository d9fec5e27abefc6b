"""Calibration: statistics of each layer's input, streamed over a few batches; no activation is kept.

Today one statistic, the norm of each input feature, from one pass over the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dovetail.batches import IGNORED, Collator, encode, pad_id
from dovetail.chain.layout import ConvLayout
from dovetail.chain.linear import ChainLinear
from dovetail.errors import DataError
from dovetail.progress import Bar
from dovetail.tasks import Task

Batch = Mapping[str, Tensor]


@torch.no_grad()
def input_norms(
    model: nn.Module, layers: Mapping[str, ChainLinear], batches: Iterable[Batch], *, progress: bool = False
) -> dict[str, Tensor]:
    """‖x_i‖₂ of each input feature of each layer over all tokens of the batches; padding is left out.

    layers   the layers to watch, all inside the model
    batches  keyword arguments of the model's forward; `attention_mask` (b, t), where there is one, tells padding apart
    returns  layer name -> (i,) float32 on the layer's device
    errors   DataError for NaN activations, and for a layer that no input reached (names the layer)
    """
    squares = {
        name: torch.zeros(layer.in_features, dtype=torch.float64, device=layer.base.device)
        for name, layer in layers.items()
    }
    mask: Tensor | None = None

    def watch(name: str, layer: ChainLinear) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            if isinstance(layer.layout, ConvLayout):
                squares[name] += _conv_squares(x, layer.layout)
                return
            if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
                x = x[mask]
            squares[name] += x.reshape(-1, x.shape[-1]).to(torch.float32).square().sum(0, dtype=torch.float64)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name, layer)) for name, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    batches = list(batches)  # token ids: small
    device = next(model.parameters()).device
    try:
        with Bar("calibrating", len(batches), shown=progress) as bar:
            for batch in batches:
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
                model(**batch)
                bar.advance()
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    for name, square in squares.items():
        if not bool(torch.isfinite(square).all()):
            raise DataError(
                f"calibration of {name}",
                found="NaN or infinite activations",
                rule="activations are finite",
                fix="look at the layers before it, or calibrate in float32",
            )
        if not bool(square.any()):  # an expert that no token was sent to: every weight would score the same
            raise DataError(
                f"calibration of {name}",
                found="no input, or nothing but zeros",
                rule="every layer to be pruned sees some of the calibration data",
                fix="more calibration data, leave the layer out of the targets, or prune by magnitude",
            )
    return {name: square.sqrt().to(torch.float32) for name, square in squares.items()}


def _conv_squares(x: Tensor, layout: ConvLayout) -> Tensor:
    """Σ x² of each entry of a convolution's flattened kernel (i / groups · k,), the groups added up."""
    if isinstance(layout.padding, str):
        total = [d * (k - 1) for d, k in zip(layout.dilation, layout.kernel, strict=True)]
        sides = [(n // 2, n - n // 2) if layout.padding == "same" else (0, 0) for n in total]
    else:
        sides = [(p, p) for p in layout.padding]
    square = x.to(torch.float32).square()
    if square.dim() == len(layout.kernel) + 1:
        square = square[None]
    square = nn.functional.pad(square, [n for side in reversed(sides) for n in side])
    kernel, stride, dilation = layout.kernel, layout.stride, layout.dilation
    if len(kernel) == 1:
        square, kernel, stride, dilation = square[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    columns = nn.functional.unfold(square, kernel, dilation=dilation, stride=stride)  # (b, c·k, positions)
    return columns.sum((0, 2), dtype=torch.float64).view(layout.groups, -1).sum(0)


def calibration_batches(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    max_length: int = 512,
    decoder_start: int | None = None,
) -> list[dict[str, Tensor]]:
    """Inputs to calibrate pruning and quantization on: `samples` rows of the train split, drawn by `seed`.

    decoder_start   the token that an encoder-decoder's decoder begins with; None for other models
    returns         batches of input_ids, attention_mask (rows, tokens), padded right, and for an encoder-decoder
                    decoder_input_ids
    """
    records = task.split("train")
    chosen = Random(seed).sample(range(len(records)), min(samples, len(records)))
    rows = encode(
        task.kind,
        [records[i] for i in chosen],
        tokenizer,
        encoder_decoder=decoder_start is not None,
        max_length=min(max_length, tokenizer.model_max_length),
    )[:samples]
    collate = Collator(pad_id(tokenizer))
    batches = []
    for at in range(0, len(rows), batch_size):
        batch = collate(rows[at : at + batch_size])
        labels = batch.pop("labels")
        if decoder_start is not None and labels.ndim == 2:
            start = torch.full_like(labels[:, :1], decoder_start)
            shifted = torch.cat([start, labels[:, :-1]], 1)
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, collate.pad_id)
        batches.append(batch)
    return batches
