"""Export to peft: an adapter directory that stock peft loads and that computes what the chain computes.

    adapter_config.json        the method, the full names of its layers, rank and alpha (of single layers too)
    adapter_model.safetensors  its parameters, and the modules that were trained with it, such as a classifier's head

peft supports one adapter on frozen weights. So the current stage of the chain must train exactly one `PeftAdapter`;
every other chain is refused by name. Elastic adapters are written at the ranks that they run at, by `rank_pattern` and
`alpha_pattern`. The adapter belongs to the base that the chain made. Where that base is pruned or quantized, or an
earlier stage trained it, peft needs the same base (docs/peft.md).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.layer.applied import AppliedChain, applied
from dovetail.chains.layer.linear import ChainLinear, LinkState
from dovetail.chains.link import Adapter, Constraint
from dovetail.errors import ChainError
from dovetail.files import atomic, write_whole
from dovetail.links.adapt.peft import PeftAdapter, name_layers
from dovetail.models.experts import expert_layers
from dovetail.models.layouts import LinearLayout
from dovetail.models.targets import inside, new_heads

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""The text that peft puts before a module's path."""
CLASSIFIER_HEADS = ("classifier", "score")
"""The modules of a sequence classifier that peft always saves."""


def export_peft(model: nn.Module, directory: str | Path) -> Path:
    """Write the adapter of the current stage as a peft adapter directory, created if needed.

    model     under a chain that trains one of lora, dora, adalora, ia3, loha and vera, with no constraint; it is
              unchanged
    returns   the directory. The config is written last, so an interrupted export leaves nothing that loads
    errors    ChainError that names what peft cannot express and what to do instead; nothing is written then
    """
    record = applied(model)
    layers = record.layers
    kind = kind_of(record)
    check_layers(model, record, layers, kind)
    states = [layer.states[0] for layer in layers.values()]
    tensors = {}
    for state in states:
        values = state.values()
        for ours, theirs in kind.peft_tensors.items():
            if ours in values:
                value = values[ours].detach()
                tensors[f"{PREFIX}{state.site.name}.{theirs}"] = value.view(kind.peft_shape(ours, value.shape))
    tensors |= _constants(kind, states[0])
    links = {state.site: state.running for state in states}
    config = adapter_config(
        model, record, kind, kind.to_peft(links, seed=record.seed, where=f"export_peft of {record.chain}")
    )
    heads, config["task_type"] = trained_beside(model, layers), task_of(model)
    config["modules_to_save"] = heads or None
    saved = (*heads, *CLASSIFIER_HEADS) if config["task_type"] == "SEQ_CLS" else heads
    for path, module in saved_modules(model, saved).items():
        if adapted := [name for name in layers if inside(name, [path])]:
            found = f"{adapted[0]} under the chain, in {path}"
            fix = f"leave {adapted[0]} out of the targets, or freeze {path}"
            raise refused(record, found, "a module that peft saves whole must contain no adapted layer", fix)
        tensors |= {f"{PREFIX}{path}.{key}": value.clone() for key, value in module.state_dict().items()}
    write_adapter(Path(directory), config, tensors)
    return Path(directory)


def refused(record: AppliedChain, found: str, rule: str, fix: str = "") -> ChainError:
    """Return the error for what peft cannot express."""
    return ChainError(f"export_peft of {record.chain}", found=found, rule=rule, fix=fix)


def kind_of(record: AppliedChain) -> type[PeftAdapter]:
    """Return the class of the one adapter that the stage trains; raise ChainError for any other stage."""
    links = record.stage.trained
    merged = "merge the chain and save the model, which then has no adapter"
    for link in links:
        if isinstance(link, Constraint):
            rule = f"peft cannot re-impose the base's {link.restores}"
            raise refused(record, str(link), rule, merged)
        if not isinstance(link, PeftAdapter):
            raise refused(record, str(link), f"peft has no adapter {link.name}", "save it with save_adapter")
    if len(links) != 1:
        found = " >> ".join(map(str, links)) or "no adapter"
        raise refused(record, found, "a peft adapter must be one link", merged if links else "")
    if record.taken:
        found = f"{links[0]}, whose base is the weight less a low rank"
        rule = "peft would put the adapter on a base from which nothing was taken"
        raise refused(record, found, rule, "save it with save_adapter, or merge the chain and save the model")
    link = links[0]
    assert isinstance(link, Adapter)
    if link.moves is not None:
        raise refused(record, str(link), f"peft has no adapter that trains the {link.moves} of a grid", merged)
    assert isinstance(link, PeftAdapter)
    return type(link)


def check_layers(
    model: nn.Module, record: AppliedChain, layers: Mapping[str, ChainLinear], kind: type[PeftAdapter]
) -> None:
    """Raise ChainError for layers that a peft adapter of this kind cannot adapt."""
    experts = expert_layers(model)
    for name, layer in layers.items():
        fix = f"leave {name} out of the targets"
        if name in experts:
            rule = "a peft adapter of this form cannot adapt one expert of a three-dimensional parameter"
            raise refused(record, f"{name}, an expert", rule, "save it with save_adapter, or leave the experts out")
        if not layer.layout.linear:
            raise refused(record, f"{name}, a convolution", "only adapters of linear layers are exported", fix)
        if not kind.peft_conv1d and not isinstance(layer.layout, LinearLayout):
            rule = f"peft supports {kind.name} on nn.Linear, not on GPT-2's Conv1D"
            raise refused(record, f"{name}, a Conv1D", rule, fix)
    paths = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, ChainLinear))
    for name, layer in layers.items():
        if paths[id(layer)] > 1:
            rule = "an adapted layer must have one path, because peft adapts one path of a layer"
            raise refused(record, f"{name}, which has {paths[id(layer)]} paths", rule)


def _constants(kind: type[PeftAdapter], state: LinkState) -> dict[str, Tensor]:
    """Return the shared constants (VeRA's projections) by peft's names, at the rank that runs, float32 as in peft."""
    shared = state.shared.on(torch.device("cpu"), torch.float32) if kind.peft_constants else {}
    if state.rank is not None and isinstance(state.link, PeftAdapter):
        shared = state.link.at_rank(shared, state.rank)
    return {theirs: shared[ours] for ours, theirs in kind.peft_constants.items()}


def adapter_config(
    model: nn.Module, record: AppliedChain, kind: type[PeftAdapter], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the adapter_config.json of the installed peft, without task and modules_to_save.

    fields  the arguments of the configuration class of the method
    """
    # Imported here because the import of peft takes seconds.
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import PreTrainedModel

    layers, fields = record.layers, dict(fields)
    if kind.peft_conv1d:
        fields["fan_in_fan_out"] = any(not isinstance(layer.layout, LinearLayout) for layer in layers.values())
    others = [name for name in stock_modules(model) if name not in layers]
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind.peft_type]  # type: ignore[index]
    written = config(target_modules=name_layers(layers, others, "."), **fields).to_dict()
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}
    # A changed base has no name: peft would otherwise load the unchanged base of that name.
    plain = isinstance(model, PreTrainedModel) and record.number == 0 and not record.stage.applied
    written["base_model_name_or_path"] = (model.name_or_path or None) if plain else None
    written["inference_mode"] = True
    return written


def stock_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module, with every path of each module, without the parts of chain layers."""
    inside = tuple(f"{name}." for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, ChainLinear))
    every = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in every if name and not name.startswith(inside)}


def saved_modules(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules that peft saves for these `modules_to_save`: those whose path ends with one of them."""
    ends = tuple(names)
    return {path: module for path, module in stock_modules(model).items() if ends and path.endswith(ends)}


def trained_beside(model: nn.Module, layers: Mapping[str, ChainLinear]) -> list[str]:
    """Return the paths of modules outside the chain that are saved with it: heads, and owners of trained parameters."""
    in_chain = {id(p) for layer in layers.values() for p in layer.parameters()}
    heads, paths = new_heads(model), []
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        head = next((path for path in heads if inside(name, [path])), "")
        if id(parameter) in in_chain or not (parameter.requires_grad or head):
            continue
        path = head or name.rpartition(".")[0]
        if not path or owners[id(parameter)] > 1:
            found = f"{name}, trained" + (", shared with another module" if path else "")
            rule = "a parameter trained with an adapter must belong to one module, which peft saves as a copy"
            raise ChainError("export_peft", found=found, rule=rule, fix="freeze it before training")
        paths.append(path)
    return list(dict.fromkeys(paths))


def task_of(model: nn.Module) -> str | None:
    """Return peft's task_type of the model; None where peft has no class for it."""
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
    """Write a peft adapter directory, created if needed; the config comes last, so nothing loads a partial one."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with atomic(directory / TENSORS_FILE) as part:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, metadata={"format": "pt"})
        # The config of an older adapter must never be beside the new tensors.
        (directory / CONFIG_FILE).unlink(missing_ok=True)
    write_whole(directory / CONFIG_FILE, text)
