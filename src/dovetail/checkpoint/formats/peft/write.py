"""Export to peft: an adapter directory that stock peft loads, and that computes what the chain computes.

    adapter_config.json        the method, its layers by their full names, rank and alpha, a layer's own where it has
    adapter_model.safetensors  its parameters, and modules that were trained beside it, such as a classifier's head

peft has one adapter on frozen weights. A chain whose stage in hand trains exactly one adapter of TENSORS is that; every
other is refused by name. Elastic adapters are written at the ranks that they run at, through `rank_pattern` and
`alpha_pattern`. The adapter belongs to the base that the chain made: where that one is pruned or quantized, or was
trained by an earlier stage, peft needs that very base (docs/peft.md).
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.layer.applied import AppliedChain, applied
from dovetail.chains.layer.linear import ChainLinear, LinkState, chain_layers
from dovetail.chains.link import Adapter, Constraint, Link, OutputAdapter
from dovetail.chains.stages import stages
from dovetail.errors import ChainError
from dovetail.links.adapt import IA3, DoRA, LoHa, LoRA, VeRA
from dovetail.models.layouts import LinearLayout
from dovetail.models.targets import new_heads

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before a module's path."""
PROJECTIONS = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
"""VeRA's shared projections, by our name."""
LORA = {"A": "lora_A.weight", "B": "lora_B.weight"}
TENSORS: dict[type[Link], dict[str, str]] = {
    LoRA: LORA,
    DoRA: LORA | {"magnitude": "lora_magnitude_vector"},
    IA3: {"out_scale": "ia3_l", "in_scale": "ia3_l"},
    LoHa: {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
    VeRA: {"b": "vera_lambda_b", "d": "vera_lambda_d"},
}
"""Link -> our name of a parameter -> peft's, after the layer's path."""
CLASSIFIER_HEADS = ("classifier", "score")
"""What peft saves of a sequence classifier, whatever it's told."""


def export_peft(model: nn.Module, directory: str | Path) -> Path:
    """Writes the adapter of the stage in hand as a peft adapter directory, made if need be.

    model     under a chain that trains one of lora, dora, ia3, loha and vera, with no constraint; it isn't changed
    returns   the directory. It is never half-written: a kill leaves it without its config, so that nothing loads it
    errors    ChainError, naming what peft can't express and what to do instead; nothing is written then
    """
    record, layers = applied(model), chain_layers(model)
    _refuse_chain(record)
    states = {name: layer.states[0] for name, layer in layers.items()}
    _refuse_layers(model, record, layers)
    tensors = {}
    for name, state in states.items():
        values = state.values()
        for ours, theirs in TENSORS[type(state.link)].items():
            if ours in values:
                tensors[f"{PREFIX}{name}.{theirs}"] = _shaped(ours, values[ours].detach())
    config = _config(model, record, layers, states)
    if isinstance(next(iter(states.values())).link, VeRA):
        tensors |= _projections(states)
    heads, config["task_type"] = _trained_beside(model, layers), _task(model)
    config["modules_to_save"] = heads or None
    saved = (*heads, *CLASSIFIER_HEADS) if config["task_type"] == "SEQ_CLS" else heads
    for path, module in saved_modules(model, saved).items():
        inside = [name for name in layers if f"{name}.".startswith(f"{path}.")]
        if inside:
            raise _refused(
                record, f"{inside[0]} under the chain, in {path}, which peft saves whole", "one or the other"
            )
        tensors |= {f"{PREFIX}{path}.{key}": value.clone() for key, value in module.state_dict().items()}
    write_adapter(Path(directory), config, tensors)
    return Path(directory)


def _refused(record: AppliedChain, found: str, rule: str, fix: str = "") -> ChainError:
    return ChainError(f"export_peft of {record.chain}", found=found, rule=rule, fix=fix)


def _refuse_chain(record: AppliedChain) -> None:
    links = stages(record.chain)[record.stage].trained
    merged = "merge the chain and save the model: there is no adapter left then"
    for link in links:
        if isinstance(link, Constraint):
            rule = f"peft adds to the weight and can't re-impose the base's {link.restores}"
            raise _refused(record, str(link), rule, merged)
        if isinstance(link, OutputAdapter):
            raise _refused(record, str(link), "peft has no such adapter", "save_adapter keeps it for Dovetail")
        if type(link) not in TENSORS:
            rule = f"peft's adapters are {', '.join(cls.name for cls in TENSORS)}"
            raise _refused(record, str(link), rule, "save_adapter keeps it for Dovetail")
    if len(links) != 1:
        found = " >> ".join(map(str, links)) or "no adapter"
        raise _refused(record, found, "a peft adapter is one link", merged if links else "")


def _refuse_layers(model: nn.Module, record: AppliedChain, layers: Mapping[str, ChainLinear]) -> None:
    for name, layer in layers.items():
        fix = f"leave {name} out of the targets"
        if not layer.layout.linear:
            raise _refused(record, f"{name}, a convolution", "only linear layers are written for peft", fix)
        if isinstance(layer.states[0].link, LoHa) and not isinstance(layer.layout, LinearLayout):
            raise _refused(record, f"{name}, a Conv1D", "peft's LoHa stands on nn.Linear, not on GPT-2's Conv1D", fix)
    paths = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, ChainLinear))
    for name, layer in layers.items():
        if paths[id(layer)] > 1:
            rule = "peft adapts a layer under one path and leaves its others as they were"
            raise _refused(record, f"{name}, which has {paths[id(layer)]} paths", rule)


def _shaped(ours: str, value: Tensor) -> Tensor:
    """A parameter in peft's shape."""
    return value[:, None] if ours == "out_scale" else value[None] if ours == "in_scale" else value


def _config(
    model: nn.Module, record: AppliedChain, layers: Mapping[str, ChainLinear], states: Mapping[str, LinkState]
) -> dict[str, Any]:
    """adapter_config.json of the installed peft, without task and modules_to_save."""
    # Here, not above: peft's import takes seconds.
    from peft import IA3Config, LoHaConfig, LoraConfig, VeraConfig
    from transformers import PreTrainedModel

    links = {name: state.running for name, state in states.items()}
    others = [name for name in stock_modules(model) if name not in layers]
    plain = isinstance(model, PreTrainedModel) and record.stage == 0 and not stages(record.chain)[0].applied
    targets = _named(layers, [f".{name}" for name in others], lambda name: f".{name}")
    transposed = any(not isinstance(layer.layout, LinearLayout) for layer in layers.values())
    link = next(iter(links.values()))
    if isinstance(link, LoRA | DoRA):
        r, alpha, rank_pattern, alpha_pattern = _ranks(links)
        config = LoraConfig(
            r=r, lora_alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, target_modules=targets,
            use_dora=isinstance(link, DoRA), use_rslora=isinstance(link, LoRA) and link.scaling == "rs",
            lora_dropout=link.dropout if isinstance(link, LoRA) else 0.0, fan_in_fan_out=transposed,
        )  # fmt: skip
    elif isinstance(link, LoHa):
        r, alpha, rank_pattern, alpha_pattern = _ranks(links)
        config = LoHaConfig(
            r=r, alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, target_modules=targets
        )
    elif isinstance(link, VeRA):
        ranks = sorted({link.r for link in links.values() if isinstance(link, VeRA)})
        if len(ranks) > 1:
            raise _refused(record, f"ranks {ranks}", "peft's VeRA has one rank", "run every group at the same rank")
        config = VeraConfig(
            r=link.r, target_modules=targets, projection_prng_key=record.seed if link.seed is None else link.seed,
            save_projection=True, vera_dropout=link.dropout, d_initial=link.d_initial, fan_in_fan_out=transposed,
        )  # fmt: skip
    else:
        scaled = [name for name, state in states.items() if "in_scale" in state.values()]
        # peft looks at the end of a path here, and not even at whole names.
        feedforward = _named(scaled, [name for name in layers if name not in scaled], str)
        config = IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=transposed)
    written = config.to_dict()
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}
    # Another base than the one of that name would be taken for it, so a changed one stays without a name.
    written["base_model_name_or_path"] = (model.name_or_path or None) if plain else None
    written["inference_mode"] = True
    return written


def _named(names: Iterable[str], others: Iterable[str], end: Any) -> list[str] | str:
    """The names as peft takes them: a list, or one regular expression where a name is the end of another layer's."""
    names, others = list(names), list(others)
    ends = tuple(end(name) for name in names)
    if ends and any(other.endswith(ends) for other in others):
        return "|".join(map(re.escape, names))
    return names


def _ranks(links: Mapping[str, Link]) -> tuple[int, Any, dict[str, int], dict[str, Any]]:
    """The most common rank and alpha, and those of the layers that have others, by patterns that fit one path alone.

    peft takes the first pattern p for which `(.*\\.)?(p)$` fits; a leading ^ leaves no room for anything before.
    Its own types say that alpha is an integer; it computes with any number.
    """
    ranks, alphas = {}, {}
    for name, link in links.items():
        assert isinstance(link, LoRA | DoRA | LoHa)
        alpha = link.r if link.alpha is None else link.alpha
        ranks[f"^{re.escape(name)}"] = link.r
        alphas[f"^{re.escape(name)}"] = int(alpha) if float(alpha).is_integer() else alpha
    (r, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    return r, alpha, {k: v for k, v in ranks.items() if v != r}, {k: v for k, v in alphas.items() if v != alpha}


def _projections(states: Mapping[str, LinkState]) -> dict[str, Tensor]:
    """VeRA's projections at the rank that runs, of the widest layer, float32 as peft draws them."""
    state = next(iter(states.values()))
    shared: dict[str, Tensor] = state.shared.on(torch.device("cpu"), torch.float32)
    if state.rank is not None and isinstance(state.link, Adapter):
        shared = state.link.at_rank(shared, state.rank)
    return {theirs: shared[ours] for ours, theirs in PROJECTIONS.items()}


def stock_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, every path of each, as the model was before its chain: without what chain layers are made of."""
    inside = tuple(f"{name}." for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, ChainLinear))
    every = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in every if name and not name.startswith(inside)}


def saved_modules(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The modules that peft saves whole for these `modules_to_save`: those whose path ends so."""
    ends = tuple(names)
    return {path: module for path, module in stock_modules(model).items() if ends and path.endswith(ends)}


def _trained_beside(model: nn.Module, layers: Mapping[str, ChainLinear]) -> list[str]:
    """Paths of the modules outside the chain that belong to its adapter: heads, and owners of trained parameters."""
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    heads, paths, owners = (
        new_heads(model),
        [],
        Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False)),
    )
    for name, parameter in model.named_parameters():
        head = next((path for path in heads if name.startswith(f"{path}.")), "")
        if id(parameter) in inside or not (parameter.requires_grad or head):
            continue
        path = head or name.rpartition(".")[0]
        if not path or owners[id(parameter)] > 1:
            found = f"{name}, trained" + (", shared with another module" if path else "")
            rule = "peft saves modules that are trained beside an adapter, each a copy of its own"
            raise ChainError("export_peft", found=found, rule=rule, fix="freeze it before training")
        paths.append(path)
    return list(dict.fromkeys(paths))


def _task(model: nn.Module) -> str | None:
    """peft's name for what the model does, where it has its own class for it."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if name.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a peft adapter directory, made if need be; a kill leaves it without its config, so nothing loads it."""
    directory.mkdir(parents=True, exist_ok=True)
    staged = {name: directory / f".{name}.part" for name in (TENSORS_FILE, CONFIG_FILE)}
    try:
        save_file(
            {k: v.cpu().contiguous() for k, v in tensors.items()}, staged[TENSORS_FILE], metadata={"format": "pt"}
        )
        staged[CONFIG_FILE].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # An older adapter here goes first: its config must never stand beside the new tensors.
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        for name, part in staged.items():
            os.replace(part, directory / name)
    finally:
        for part in staged.values():
            part.unlink(missing_ok=True)
