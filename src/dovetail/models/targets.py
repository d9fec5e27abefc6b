"""Which layers to adapt: labels (query, key, value, output, gate, up, down), globs over module paths, "all-linear".

A target that begins with "!" excludes what its glob fits: ["all-linear", "!*.router", "!vision*"].

The labels are those of CLAM's GenericTransformer: they name what a layer does, so that one recipe fits every family.
`dovetail.models.roles` has the whole table. A fused layer answers to several labels (GPT-2's c_attn is query, key and
value at once).

A head (the output embedding, a classifier, the pooler that feeds it) carries no label and is no part of
"all-linear"; it is adapted only when named by its path. peft leaves out the output embedding too, and the classifier
if it knows the task, but adapts poolers and the inner layers of a head; here a head is trained whole or not at all.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dovetail.errors import TargetError
from dovetail.models.experts import Experts, can_open, opened
from dovetail.models.layouts import TransposedLinear, is_plain, layout_of
from dovetail.models.roles import LABELS, path_matches, roles_of
from dovetail.models.weight_reads import reads_weight

ALL_LINEAR = "all-linear"
LEAST_WIDTH = 8
"""The least number of inputs and outputs of a layer in "all-linear": narrower ones are gates and coefficients."""
# What transformers calls the parts after the last block, as direct children of a PreTrainedModel.
HEADS = frozenset(
    {
        "lm_head",
        "embed_out",
        "cls",
        "generator_predictions",
        "score",
        "classifier",
        "pre_classifier",
        "classification_head",
        "qa_outputs",
        "pooler",
        "sequence_summary",
        "logits_proj",
        "vocab_projector",
        "vocab_transform",
        "predictions",
        "multiple_choice_head",
        "summary",
    }
)


@dataclass(frozen=True)
class Target:
    """A layer to adapt.

    name         module path, such as "model.layers.0.self_attn.q_proj"
    module       nn.Linear, transformers' Conv1D (its weight is (in, out)), nn.Conv1d or nn.Conv2d, or a layer with the
                 matrix of one expert
    roles        the labels that it answers to, in LABELS' order; several for a fused layer, none when unlabelled
    feedforward  whether it is a feed-forward's output layer ("down"), where IA3 scales inputs, not outputs
    aliases      further paths that hold the same module object; whoever replaces the layer replaces it there too
    experts      of an expert in a three-dimensional parameter: the opened module, to be put in the stock one's place
                 (`dovetail.models.experts`)
    """

    name: str
    module: nn.Module
    roles: tuple[str, ...]
    feedforward: bool
    aliases: tuple[str, ...] = ()
    experts: Experts | None = None


def find_targets(model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR) -> list[Target]:
    """Return the layers of `model` that `targets` names, each once, in module order.

    model    any nn.Module
    targets  a label of LABELS; "all-linear"; a glob over module paths, which also fits the end of a path ("q_proj",
             "layers.0.*"); or several of these, as a sequence or separated by commas. "!" before a label or a glob
             excludes what it fits

    "all-linear" is every nn.Linear and transformers Conv1D outside the heads, without those that cannot be changed
    alone (weights shared with another module, read by the model without calling the layer, or not stored as one
    floating-point parameter), without layers of the model's own classes that compute something else, without the
    routers of MoE experts, and, in a PreTrainedModel, without layers of fewer than LEAST_WIDTH inputs or outputs,
    which are gates and mixing coefficients. Convolutions are found only when a glob names them. A model that neither
    is nor contains a PreTrainedModel has no known head. Each expert that a model keeps in a three-dimensional
    parameter (Mixtral and others in transformers 5) is a layer called after that parameter,
    "model.layers.0.mlp.experts.gate_up_proj.3";
    `fused_experts` lists modules with such parameters that have no known form.

    Raises TargetError when a target or an exclusion matches nothing, when a label or glob names a layer that cannot be
    changed alone, and for a layer of a class that computes something else (`dovetail.models.layouts`).
    """
    found = select(model, targets)
    for target in found:
        layout_of(target.name, target.module)
    return found


def select(model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR) -> list[Target]:
    """Return what `find_targets` returns, with layers whose class it refuses."""
    asked = _split(targets)
    excluded = [target[1:].strip() for target in asked if target.startswith("!")]
    asked = [target for target in asked if not target.startswith("!")]
    layers = all_layers(model)
    where = f"targets {', '.join(asked)!r} in {type(model).__name__}"
    if not asked:
        raise TargetError(
            where, found="no target", rule="targets must name at least one layer", fix=f"pass targets={ALL_LINEAR!r}"
        )
    if not any(is_linear(layer.module) for layer in layers) and (ALL_LINEAR in asked or not layers):
        raise TargetError(
            where,
            found=_describe(model, layers),
            rule="a chain needs linear layers",
            fix="name convolutions by a glob" if layers else "choose a model that has nn.Linear or Conv1D layers",
        )
    refusals = _refusals(model, layers)
    chosen: set[str] = set()
    for target in asked:
        if target == ALL_LINEAR:
            chosen.update(_all_linear(where, model, layers, refusals))
            continue
        matched = [layer.name for layer in layers if matches(layer, target)]
        if not matched:
            raise _nothing_matches(model, target, layers)
        for name in matched:
            if name in refusals and not any(path_matches(name, pattern) for pattern in excluded):
                rule = "a target must own its weight, one floating-point parameter, and be called as a layer"
                fix = "leave it out, or give it a weight of its own first (an output head: tie_word_embeddings=False)"
                raise TargetError(f"target {target!r} at {name}", found=refusals[name], rule=rule, fix=fix)
        chosen.update(matched)
    kept = [layer for layer in layers if layer.name in chosen and not any(matches(layer, each) for each in excluded)]
    for pattern in excluded:
        if not any(matches(layer, pattern) for layer in layers) and not _is_module(model, pattern):
            raise _nothing_matches(model, pattern, layers)
    if not kept:
        rule, fix = "targets must name at least one layer", "leave out one of the exclusions"
        raise TargetError(where, found=f"nothing left but for {', '.join(excluded)}", rule=rule, fix=fix)
    return kept


def labels(model: nn.Module) -> dict[str, list[str]]:
    """Return label -> paths of its layers, in module order, without labels that have no layer."""
    layers = all_layers(model)
    found = {label: [layer.name for layer in layers if label in layer.roles] for label in LABELS}
    return {label: names for label, names in found.items() if names}


def heads(model: nn.Module) -> list[str]:
    """Return the paths of the output head and the task heads (with poolers), in module order; [] where none is known.

    A head is the output embedding of a PreTrainedModel, or a direct child of one whose name is in HEADS.
    """
    from transformers import PreTrainedModel

    paths: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            output = module.get_output_embeddings()
            for path, child in module.named_modules():
                if (path and child is output) or path in HEADS:
                    paths.add(f"{prefix}.{path}".removeprefix("."))
    return [path for path, _ in model.named_modules() if path in paths]


def new_heads(model: nn.Module) -> list[str]:
    """Return the paths of task heads, which may be untrained, pooler included; [] for a model without one.

    A task head is what stands beside the body of a model that has no output embedding: the classifier of texts, tokens
    or images, the layer that finds answers, the one that scores choices.
    """
    beside = task_heads(model)
    return [*(paths := heads(model)), *(path for path in beside if not inside(path, paths))] if beside else []


def task_heads(model: nn.Module) -> list[str]:
    """Return the paths of the modules with parameters beside the body of a model that is no language model.

    Where no module of the model is its body (T5 for answers), they are known by name.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.can_generate() or model.get_output_embeddings() is not None:
        return []
    named = HEADS - {"pooler"}
    return [
        path
        for path, child in model.named_children()
        if (path in named if model.base_model is model else child is not model.base_model)
        and any(True for _ in child.parameters())
    ]


def inside(name: str, paths: Iterable[str]) -> bool:
    """Return whether a module or tensor of this name is one of these modules or belongs to one of them."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def fused_experts(model: nn.Module) -> list[str]:
    """Return the paths of modules that keep all MoE experts in three-dimensional parameters of an unknown form.

    Their experts are never targets.
    """
    return [
        name
        for name, module in model.named_modules()
        if ("experts" in name.rpartition(".")[2] or "Experts" in type(module).__name__)
        and any(p.ndim == 3 for p in module.parameters(recurse=False))
        and not can_open(module)
    ]


def routers(model: nn.Module) -> list[str]:
    """Return the paths of the modules that choose MoE experts: called "router", or "gate" beside experts."""
    found = []
    for path, parent in model.named_modules():
        names = [name for name, _ in parent.named_children()]
        with_experts = any("expert" in name for name in names)
        found += [
            f"{path}.{name}".removeprefix(".")
            for name in names
            if name == "router" or (with_experts and name in ("gate", "shared_expert_gate"))
        ]
    return found


def _split(targets: str | Sequence[str]) -> list[str]:
    parts = targets.split(",") if isinstance(targets, str) else [part for text in targets for part in text.split(",")]
    return [part.strip() for part in parts if part.strip()]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: nn.Linear, transformers' Conv1D, derived from one, or an expert."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D, TransposedLinear))


def all_layers(model: nn.Module) -> list[Target]:
    """Return every layer that could be a target, convolutions, heads and experts included, in module order."""
    from transformers.pytorch_utils import Conv1D

    paths: dict[nn.Module, list[str]] = {}
    owners: dict[nn.Module, Experts] = {}
    opened_now: dict[nn.Module, Experts | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, (nn.Linear, Conv1D, TransposedLinear, nn.Conv1d, nn.Conv2d)):
            paths.setdefault(module, []).append(name)
        if module not in opened_now:
            opened_now[module] = opened(module)
        if (experts := opened_now[module]) is not None:
            for own, layer in experts.matrices():
                owners[layer] = experts
                paths.setdefault(layer, []).append(f"{name}.{own}".removeprefix("."))
    head_paths = heads(model)
    layers = []
    for module, (name, *aliases) in paths.items():
        roles = () if not is_linear(module) or inside(name, head_paths) else roles_of(name)
        layers.append(Target(name, module, roles, "down" in roles, tuple(aliases), owners.get(module)))
    return layers


def matches(layer: Target, target: str) -> bool:
    """Return whether a label or a glob fits the layer; "all-linear" fits every one."""
    if target in LABELS:
        return target in layer.roles
    return target == ALL_LINEAR or any(path_matches(name, target) for name in (layer.name, *layer.aliases))


def _all_linear(where: str, model: nn.Module, layers: list[Target], refusals: dict[str, str]) -> list[str]:
    head_paths, choosing = heads(model), routers(model)
    body = [layer for layer in layers if is_linear(layer.module) and not inside(layer.name, [*head_paths, *choosing])]
    own = [layer for layer in body if layer.name not in refusals]
    narrow = _narrow(model, own)
    free = [layer.name for layer in own if layer.name not in narrow]
    if free:
        return free
    first = body[0].name if body else ""
    raise TargetError(
        where,
        found=f"{first}: {refusals.get(first, f'fewer than {LEAST_WIDTH} inputs or outputs')}"
        if body
        else f"linear layers only in {', '.join([*head_paths, *choosing])}",
        rule=f"{ALL_LINEAR} is every linear layer outside the heads whose weight is its own floating-point parameter",
        fix="load the model unquantized and untied" if body else "name the layers by a glob, such as " + layers[0].name,
    )


def _narrow(model: nn.Module, layers: list[Target]) -> set[str]:
    """Return the layers of a PreTrainedModel with fewer than LEAST_WIDTH inputs or outputs."""
    from transformers import PreTrainedModel

    known = [path for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    return {
        layer.name
        for layer in layers
        if min(layer.module.get_parameter("weight").shape, default=0) < LEAST_WIDTH
        and ("" in known or inside(layer.name, known))
    }


def _is_module(model: nn.Module, pattern: str) -> bool:
    return any(path_matches(path, pattern) for path, _ in model.named_modules())


def _refusals(model: nn.Module, layers: list[Target]) -> dict[str, str]:
    """Return layer name -> why the layer cannot be changed alone."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((f"{path}.{parameter_name}".removeprefix("."), module))
    refusals = {}
    for layer in layers:
        if layer.experts is not None:
            continue
        parent, _, child = layer.name.rpartition(".")
        parameters = dict(layer.module.named_parameters(recurse=False))
        shared = [
            f"{name} shared with {path}"
            for name, parameter in parameters.items()
            for path, owner in owners[id(parameter)]
            if owner is not layer.module
        ]
        if isinstance(layer.module, NonDynamicallyQuantizableLinear):
            # nn.MultiheadAttention reads this layer's weight and never calls it: a replacement would do nothing.
            refusals[layer.name] = "the output layer of nn.MultiheadAttention, which is never called as a layer"
        elif "weight" not in parameters:
            refusals[layer.name] = "weight is computed from others (a parametrization), not stored"
        elif not parameters["weight"].dtype.is_floating_point:
            refusals[layer.name] = f"weight stored as {parameters['weight'].dtype}, already quantized elsewhere"
        elif shared:
            refusals[layer.name] = "; ".join(shared)
        elif _computes_something_else(model, layer.module):
            refusals[layer.name] = f"a {type(layer.module).__name__}, which computes something else than x Wᵀ + b"
        elif reads_weight(model.get_submodule(parent), child):
            refusals[layer.name] = f"{type(model.get_submodule(parent)).__name__} reads its weight without calling it"
    return refusals


def _computes_something_else(model: nn.Module, module: nn.Module) -> bool:
    """Return whether a layer is one of the model's own classes that derive from nn.Linear with another forward pass.

    DeepSeek-V4's grouped projection is one. Layers of other libraries, such as quantized ones, are refused instead.
    """
    own = type(module).__module__
    return (
        isinstance(module, nn.Linear)
        and not is_plain(type(module))
        and (own.startswith("transformers.models.") or own == type(model).__module__)
    )


def _nothing_matches(model: nn.Module, target: str, layers: list[Target]) -> TargetError:
    present = [label for label in LABELS if any(label in layer.roles for layer in layers)]
    ends = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers if not layer.name[-1].isdigit()))
    inside = [layer for layer in layers if any(path_matches(layer.name, f"{target}{end}") for end in (".*", "*"))]
    close = difflib.get_close_matches(target, [*present, ALL_LINEAR, *ends, *(layer.name for layer in layers)], n=3)
    if target in LABELS and any(path_matches(layer.name, target) for layer in layers):
        fix = f"use *{target} for the layer of that name"
    elif inside and target not in LABELS:
        fix = f"use {target}.* for the layers in it" if path_matches(inside[0].name, f"{target}.*") else f"{target}*"
    else:
        fix = " or ".join(close) or f"{ALL_LINEAR}, or one of the names above"
    return TargetError(
        f"target {target!r} in {type(model).__name__}",
        found=_describe(model, layers),
        rule=f"a target is a label ({', '.join(LABELS)}), {ALL_LINEAR}, or a glob that fits the path of a layer",
        fix=fix,
    )


def _describe(model: nn.Module, layers: list[Target], *, most: int = 12) -> str:
    """Return one line that lists the layers: path with numbers starred, count, roles."""
    kinds: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for layer in layers:
        # Only the last two names: enough to tell attn.c_proj from mlp.c_proj, short enough to read.
        end = ".".join("*" if part.isdigit() else part for part in layer.name.split(".")[-2:])
        counts[end] += 1
        kinds[end] = "/".join(layer.roles)
    shown = [f"{end} x{counts[end]}" + (f" ({kinds[end]})" if kinds[end] else "") for end in list(counts)[:most]]
    text = f"{len(layers)} layers: {', '.join(shown)}" if layers else "no linear layer and no convolution"
    if len(counts) > most:
        text += f" and {len(counts) - most} more kinds"
    experts = fused_experts(model)
    if experts:
        text += f"; experts in three-dimensional parameters, which are no layers: {experts[0]} and its like"
    return text
