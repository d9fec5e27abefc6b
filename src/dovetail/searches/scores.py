"""Scores of layers: what the bits and the rank of each layer are worth, from the weights and some training records.

    error      error[l, q]   =  ‖ΔW‖² / ‖W‖²
    gradient   fisher[l, q]  =  1/N Σ_t (g_t · ΔW x_t)²     ΔW = the base of layer l compressed by q, minus its original
               energy[l, r]  =  Σ_{k ≤ r} σ_k(G)²           G  = 1/N Σ_t g_t x_tᵀ
    entropy    I(l)          =  H(Y) - H(Y|X_l)

x_t is the input of a layer at token t, g_t the gradient of the summed loss with respect to its output, and N the number
of labels. ΔW x_t is the error that compressing makes in the output of the layer, so fisher is the mean square of the
change in loss that these errors cause, to first order. For a model whose predictions are calibrated, half of it
estimates the Kullback-Leibler divergence that the errors cause (the Fisher information), where errors at different
tokens are independent. A sum over layers treats the layers as independent, too. energy is the decrease in loss, to
first order and for each unit of step size, of a gradient step that is projected to rank r. Both need one forward and
one backward pass for each batch; in each layer, the pass computes one more product for every choice.

Entropy is the measure of QR-Adaptor (Zhou et al. 2025, eq. 6), which leaves the estimator open. Here Y is a token of an
answer (or a label), and the model's own final norm and head read it from the state after each block in place of the
state after the last one (the "logit lens"). H(Y|X_l) is the mean entropy of these distributions, and H(Y) is the
entropy of the mean distribution of the whole model. I(l) lies between H(Y) - log(classes) and H(Y). It is negative
where the distributions that are read from the state are less certain than the mean distribution. It drifts with depth:
the head is trained to read the last state, so I(l) grows towards the last block in most models, whatever the block
contributes. It depends on neither bits nor rank.

`start: gradient` takes error for bits and energy for ranks. fisher is here to be compared with them
(bench/search_table.py, bench/decoder_bits.py).

All scores are taken of the model as it stands. The loss of a model that does not know the task says little about bits,
so take them inside `Workbench.tuned`. docs/search.md compares them with trainings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.linalg import times_transposed
from dovetail.compression.blocks import blocks_of
from dovetail.compression.passes import without_cache
from dovetail.errors import NotFinite, SearchError
from dovetail.models.layouts import ConvLayout
from dovetail.searches.trial import Applied, Workbench
from dovetail.tasks.finite import not_finite
from dovetail.tasks.labels import as_model_labels
from dovetail.tasks.lengths import in_evaluation, length_limit
from dovetail.tasks.tokens import IGNORED, Collator, RowMaker
from dovetail.tasks.vocabulary import pad_id, vocabulary_of

_STATES = 256
"""Rows of states that the head reads at once."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class GradientScores:
    """The scores of one backward pass, in squared nats.

    fisher   (layer, applied links) -> mean square of the change in loss, to first order; 0 or more
    energy   layer -> for each of the ranks, the energy of the mean weight gradient in its first r directions
    """

    fisher: dict[tuple[str, Applied], float]
    energy: dict[str, tuple[float, ...]]


def weight_errors(bench: Workbench, options: Mapping[str, Sequence[Applied]]) -> dict[tuple[str, Applied], float]:
    """Return the relative squared error of a layer's weights with each choice of applied links, in float32.

    options   layer -> choices of applied links that the workbench has
    returns   (layer, applied links) -> the error; that of a weight of zeros alone is 0
    """
    found = {}
    for name, choices in options.items():
        original_oi = bench.base(name, ()).matrix(torch.float32)
        square = float(original_oi.square().sum()) or 1.0
        for applied in choices:
            change_oi = bench.base(name, applied).matrix(torch.float32) - original_oi
            found[name, applied] = float(change_oi.square().sum()) / square
            _check_finite(name, found[name, applied])
    return found


def gradient_scores(
    bench: Workbench, options: Mapping[str, Sequence[Applied]], ranks: Sequence[int], samples: int
) -> GradientScores:
    """Return the Fisher score of each choice of applied links and the energy of each rank, for every layer.

    options   layer -> choices of applied links that the workbench has
    ranks     a rank beyond the smaller side of a layer counts as that side
    samples   training records, drawn by the seed of the recipe
    returns   sums over the tokens of all records, divided by the number of their labels: they depend on neither the
              batch size nor the padding, but for rounding. A layer that no gradient reaches scores 0
    errors    NotFinite, which names the module or layer; SearchError for a convolution in groups

    Scales that trained adapters put on a layer (IA3, DoRA) are part of g but not of ΔW. Needs memory for a gradient of
    each layer's weight, in float32.
    """
    layers, labels = {name: bench.record.layers[name] for name in options}, 0
    for name, layer in layers.items():
        if isinstance(layer.layout, ConvLayout) and layer.layout.groups > 1:
            rule = "the gradient score needs one matrix for all inputs of a layer"
            fix = "leave the layer out of the targets, or set start: uniform"
            raise SearchError(f"score of {name}", found="a convolution in groups", rule=rule, fix=fix)
    fisher = {(name, applied): 0.0 for name, choices in options.items() for applied in choices}
    gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def see(name: str, x: Tensor, g: Tensor) -> None:
        layout = layers[name].layout
        wide = torch.promote_types(x.dtype, torch.float32)
        x_ni, g_no = layout.input_rows(x), g.movedim(layout.out_axis, -1).reshape(-1, layout.out_features)
        reached = g_no.any(1)  # not padding, nor tokens that no label depends on: they add 0 to each sum
        x_ni, g_no = x_ni[reached].to(wide), g_no[reached].to(wide)
        gradient_oi = times_transposed(g_no.t().contiguous(), x_ni.t().contiguous())
        gradients[name] = gradients[name].add_(gradient_oi) if name in gradients else gradient_oi
        original_oi = bench.base(name, ()).matrix(wide)
        for applied in options[name]:
            change_oi = bench.base(name, applied).matrix(wide) - original_oi
            change_n = (times_transposed(x_ni, change_oi) * g_no).sum(1)
            fisher[name, applied] += float(change_n.double().square().sum())

    model = bench.model
    with in_evaluation(model), without_cache(model), _frozen(model), torch.enable_grad(), _watched(layers, see):
        for batch in _batches(bench, samples):
            counted = _counted(batch["labels"])
            loss = model(**batch).loss * counted
            if not bool(loss.isfinite()):
                raise not_finite("scores of layers", model, partial(_forward, model, batch))
            loss.backward()
            labels += counted
    energy = {}
    for name in layers:
        if name in gradients:
            gradient_oi = gradients.pop(name) / labels
            _check_finite(name, float(gradient_oi.abs().max()))
            square = torch.linalg.svdvals(gradient_oi.double()).square().cumsum(0)
        else:
            square = torch.zeros(1)
        energy[name] = tuple(float(square[min(rank, len(square)) - 1]) for rank in ranks)
    scores = GradientScores({key: value / labels for key, value in fisher.items()}, energy)
    for (name, _), value in scores.fisher.items():
        _check_finite(name, value)
    return scores


def entropy(bench: Workbench, samples: int) -> dict[str, float]:
    """Return I(l) = H(Y) - H(Y|X_l) in nats, of the block of each layer.

    samples   training records, drawn by the seed of the recipe
    returns   layer -> the score of its block
    errors    SearchError where the head does not read the states of a block: layers outside of blocks, blocks of an
              encoder whose states a decoder reads, and tasks without classes; NotFinite

    The state after each block takes the place of the outputs of all blocks, so that what follows them in the model's
    own forward pass, such as a norm and a head, reads it. On the last block, this must give the model's own output.
    """
    model, task = bench.model, bench.task
    if task.kind == "regression":
        raise _no_entropy(f"task {task.name}", "a regression")
    blocks = blocks_of(model, bench.layers)
    stack = _stack(model, blocks)
    conditional, labels = dict.fromkeys(stack, 0.0), 0
    sum_c: Tensor | float = 0.0
    with in_evaluation(model), without_cache(model), torch.no_grad():
        for batch in _batches(bench, samples):
            outputs: dict[str, Any] = {}
            with _replaced(model, stack, partial(_keep, outputs)):
                logits_nc = _at_labels(model, model(**batch).logits, batch["labels"])
            if not bool(logits_nc.isfinite().all()):
                raise not_finite("entropy of blocks", model, partial(_forward, model, batch))
            for block in blocks:
                if block not in outputs:
                    raise _no_entropy(block, "a block that the forward pass does not run")
            read_nc = logits_nc
            for block, output in outputs.items():  # in the order in which they ran
                read_nc = _read(model, stack, batch, output)
                conditional[block] += float(_entropies(read_nc).sum())
            if not float((read_nc - logits_nc).abs().max()) <= 1e-3 * (1 + float(logits_nc.abs().max())):
                raise _no_entropy(next(reversed(outputs)), "a state that the head does not read as it is")
            sum_c = sum_c + logits_nc.double().softmax(-1).sum(0)
            labels += len(logits_nc)
    mean_c = torch.as_tensor(sum_c) / labels
    whole = -float(torch.special.xlogy(mean_c, mean_c).sum())
    of_block = {name: block for block, names in blocks.items() for name in names}
    scores = {name: whole - conditional[of_block[name]] / labels for name in bench.layers}
    for name, value in scores.items():
        _check_finite(name, value)
    return scores


# --- Batches ---------------------------------------------------------------------------------------------------------
def _batches(bench: Workbench, samples: int) -> Iterator[Batch]:
    """Yield batches of training records with labels, as training makes them, on the device of the model."""
    model, settings = bench.model, bench.recipe.train
    config: Any = model.config
    task = as_model_labels(bench.task, config)
    records = task.split("train")
    chosen = Random(bench.recipe.seed).sample(range(len(records)), min(samples, len(records)))
    drawn = [records[number] for number in chosen]
    make = RowMaker(
        bench.tokenizer, config.is_encoder_decoder,
        length_limit(model, bench.tokenizer, settings.max_length, drawn), vocabulary_of(model), chosen,
    )  # fmt: skip
    rows = sorted(make.examples(task.kind, drawn), key=lambda row: len(row["input_ids"]))
    collate = Collator(pad_id(bench.tokenizer, vocabulary_of(model)))
    for at in range(0, len(rows), settings.batch_size):
        batch = collate(rows[at : at + settings.batch_size])
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


def _counted(labels: Tensor) -> int:
    """Return the number of labels that the loss is the mean over."""
    return int(labels.ne(IGNORED).sum()) if labels.dim() == 2 else len(labels)


@torch.no_grad()
def _forward(model: nn.Module, batch: Batch) -> None:
    model(**batch)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        rule = "the score of a layer must be finite"
        fix = "load the model in a dtype of larger range, or set start: uniform"
        raise NotFinite(f"score of {name}", found=str(value), rule=rule, fix=fix)


# --- Gradients -------------------------------------------------------------------------------------------------------
@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters while entered: only gradients of activations are needed."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, asked in flags:
            parameter.requires_grad_(asked)


@contextmanager
def _watched(layers: Mapping[str, ChainLinear], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While entered, call `see(name, x, g)` in each backward pass, with the input and the gradient of the output.

    The gradients of a layer exist from its backward step to that of the layer before it.
    """

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # a further pass that looks for the module that is not finite
                return y
            x: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach()
            if not y.requires_grad:  # a first layer; cloned, because a leaf cannot be changed in place
                y = y.requires_grad_().clone()
            y.register_hook(lambda g: see(name, x, g))
            return y

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- Entropy ---------------------------------------------------------------------------------------------------------
def _stack(model: Any, blocks: Mapping[str, Sequence[str]]) -> list[str]:
    """Return all blocks of the lists that these blocks lie in; SearchError for one that the head cannot read."""
    encoder = set(model.get_encoder().modules()) if model.config.is_encoder_decoder else set()
    lists = []
    for block in blocks:
        parent = block.rpartition(".")[0]
        if not isinstance(model.get_submodule(parent), nn.ModuleList):
            raise _no_entropy(block, "a layer outside of blocks")
        if model.get_submodule(block) in encoder:
            raise _no_entropy(block, "a block of an encoder, whose states a decoder reads")
        if parent not in lists:
            lists.append(parent)
    return [f"{parent}.{number}" for parent in lists for number in range(len(model.get_submodule(parent)))]


def _no_entropy(where: str, found: str) -> SearchError:
    rule = "the entropy score needs blocks after which the model's final norm and head can read a distribution"
    return SearchError(f"entropy of {where}", found=found, rule=rule, fix="set start: gradient, or change the targets")


@contextmanager
def _replaced(model: nn.Module, stack: Sequence[str], forward: Callable[..., Any]) -> Iterator[None]:
    """While entered, blocks run `forward(block, its own forward, ...)`."""
    modules = {block: model.get_submodule(block) for block in stack}
    own = {block: module.__dict__.get("forward") for block, module in modules.items()}
    for block, module in modules.items():
        module.forward = partial(forward, block, module.forward)
    try:
        yield
    finally:
        for block, module in modules.items():
            del module.forward
            if (before := own[block]) is not None:
                module.forward = before


def _keep(outputs: dict[str, Any], block: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    outputs.pop(block, None)  # a block that runs again is the last one
    outputs[block] = run(*args, **kwargs)
    return outputs[block]


def _at_labels(model: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Return what predicts the labels: logits or states (n, ...) at the counted tokens, or those of every record."""
    if labels.dim() == 1:
        return logits
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels.ne(IGNORED)]


def _read(model: Any, stack: Sequence[str], batch: Batch, output: Any) -> Tensor:
    """Return the logits (n, classes) that the model's head reads from the output of a block."""
    state, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple | list) else (output, None)

    def head(given: Batch, state_bth: Tensor) -> Tensor:
        made = state_bth if rest is None else (state_bth, *rest)
        with _replaced(model, stack, lambda block, run, *args, **kwargs: made):
            return model(**given).logits

    if batch["labels"].dim() == 1:
        return head(batch, state)
    # A norm and a head treat tokens apart from each other, so those with labels become rows of one token.
    found = []
    for rows in _at_labels(model, state, batch["labels"])[:, None].split(_STATES):
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(head(given | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}), rows)[:, 0])
    return torch.cat(found)


def _entropies(logits_nc: Tensor) -> Tensor:
    """Return the entropy (n,) of each distribution, in nats, float64."""
    log = logits_nc.double().log_softmax(-1)
    return -(log.exp() * log).nan_to_num(0.0).sum(-1)
