"""peft adapters as task vectors: the initial value of every tensor, and configurations that mean the same.

A task vector is a difference, so the start of every tensor must be known. A tensor is one of three:

    a parameter of the method   starts as STARTS says: at 0, at 1, at a field of the config, at norms of the base's
                                weight. A tensor drawn at random counts from 0, as in ComPEFT's released experts: its
                                file does not contain the draw
    a tensor of the base        starts at the base's value: saved modules, embeddings, biases, norms, trained tokens. A
                                new classifier's head counts from 0, as the base's fingerprint leaves it out
    any other                   is refused by name
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.checkpoint.formats.peft.write import CLASSIFIER_HEADS, PREFIX, saved_modules
from dovetail.errors import DovetailError, LoadError
from dovetail.links.adapt import VeRA
from dovetail.links.adapt.lora import BASE_UNCHANGED, LoraConfig
from dovetail.links.adapt.peft import REASONS, WITHOUT_EFFECT
from dovetail.models.layouts import layout_of
from dovetail.models.targets import inside, new_heads
from dovetail.models.ties import named_tensors, share_memory

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Start = float | str | Callable[[str, nn.Module], Tensor]


def _row_norms(name: str, layer: nn.Module) -> Tensor:
    """Return the norm of each output's weights (DoRA §4.1); of each column for an embedding, as in peft."""
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, nn.Embedding):
        return weight.float().norm(dim=0)
    return layout_of(name, layer).matrix(weight).float().norm(dim=1)


def _input_norms(name: str, layer: nn.Module) -> Tensor:
    """Return the norm of each input's weights."""
    return layout_of(name, layer).matrix(layer.get_parameter("weight").detach()).float().norm(dim=0)


DRAWN = 0.0
"""The start of a tensor that is drawn at random, and that no file contains."""
_LORA: Mapping[str, Start] = {
    "lora_A.weight": DRAWN, "lora_B.weight": 0.0, "lora_B.bias": 0.0, "lora_embedding_A": 0.0,
    "lora_embedding_B": DRAWN, "lora_magnitude_vector": _row_norms, "lora_magnitude_vector.weight": _row_norms,
}  # fmt: skip
STARTS: Mapping[str, Mapping[str, Start]] = {
    "LORA": _LORA,
    "ADALORA": {"lora_A": DRAWN, "lora_B": DRAWN, "lora_E": 0.0},
    "IA3": {"ia3_l": 1.0},
    "LOHA": dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), DRAWN),
    "LOKR": dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), DRAWN),
    "VERA": {"vera_lambda_b": 0.0, "vera_lambda_d": "d_initial"},
    "PVERA": {"pvera_lambda_b": 0.0, "pvera_lambda_d": "d_initial"},
    "OFT": {"oft_R.weight": 0.0},
    "BOFT": {"boft_R": 0.0, "boft_s": 1.0},
    "HRA": {"hra_u": DRAWN},
    "LN_TUNING": {},
    "TRAINABLE_TOKENS": {},
    "FOURIERFT": {"fourierft_spectrum": DRAWN},
    "VBLORA": {"vblora_logits_A": DRAWN, "vblora_logits_B": DRAWN, "vblora_vector_bank": DRAWN},
    "BONE": {"bone_block": 0.0},
    "MISS": {"miss_block": 0.0},
    "C3A": {"c3a_kernel": DRAWN},
    "ROAD": {"road_alpha": 1.0, "road_theta": 0.0},
    "WAVEFT": {"waveft_spectrum": 0.0},
    "DELORA": {"delora_A": DRAWN, "delora_B": 0.0, "delora_lambda": "delora_lambda", "delora_w_norm": _input_norms},
    "GRALORA": dict.fromkeys(("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), DRAWN),
    "HIRA": {"hira_A": DRAWN, "hira_B": 0.0},
    "LILY": {"lily_A.weight": DRAWN, "lily_B.weight": 0.0, "lily_router.weight": DRAWN},
    "PSOFT": {"psoft_R.weight": 0.0, "psoft_R.vector_a": 1.0, "psoft_R.vector_b": 1.0},
    "ADAPTION_PROMPT": {"adaption_prompt": DRAWN, "adaption_gate": 0.0},
    "PROMPT_TUNING": {"prompt_embeddings": DRAWN},
    "PREFIX_TUNING": {"prompt_embeddings": DRAWN},
    "P_TUNING": {"prompt_embeddings": DRAWN},
}
"""peft_type -> name of a tensor after the layer's path -> its start: a number, a field of the config, or a function."""
_TOGETHER = {
    "LORA": [{"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}],
    "ADALORA": [set(STARTS["ADALORA"])],
    "LOHA": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}],
    "VERA": [set(STARTS["VERA"])],
}
"""Parameters that a layer has together: peft draws a missing one at random when it loads the adapter."""
NO_ZERO = {"HRA", "VBLORA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"}
"""Methods whose tensors change the model at their starts too, since these are drawn and count as 0."""
_TOKENS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
_WRAPPERS = (".token_adapter.base_layer", ".base_layer", ".original_module", ".ln_tuning_layers")
"""What peft puts between the path of a module of the base and its parameters."""
_CONSTANTS = (*VeRA.peft_constants.values(), "base_model.model.vera_A", "base_model.model.vera_B")
_DEFAULTS = {"d_initial": 0.1, "delora_lambda": 15.0}


def peft_initial(config: Config, shapes: Shapes, base: nn.Module | None) -> dict[str, Tensor]:
    """Return a peft adapter's initial values by tensor, float32 on the CPU; tensors without an entry start at 0.

    config  adapter_config.json
    shapes  of the adapter's tensors, by their names in adapter_model.safetensors
    base    the model of the adapter, with or without it; needed only for what starts at values of its weights
    returns new tensors that share no memory with the base
    errors  LoadError for a config that `check_config` refuses, for a tensor whose start is not known, and if the base
            is needed and missing, or lacks a layer
    """
    check_config(config)
    table, found = STARTS[config["peft_type"]], {}
    heads = [] if base is None else new_heads(base)
    for name, shape in shapes.items():
        path, start = _start(config, table, name)
        if isinstance(start, str):
            value = torch.full(shape, _number(config, start))
        elif start is None and (inside(path, heads) or path.split(".")[0] in CLASSIFIER_HEADS):
            continue
        elif start is None:
            value = _of_base(base, config, path, name)
        elif callable(start):
            value = start(name, _module(base, path, name)).reshape(-1)
            value = value.view(shape) if value.numel() == torch.Size(shape).numel() else value
        elif start:
            value = torch.full(shape, start)
        else:
            continue
        if tuple(value.shape) != tuple(shape):
            rule = f"it must be {list(value.shape)}, as in the base"
            raise LoadError(f"task vector at {name}", found=f"shape {list(shape)}", rule=rule, fix="pass its own base")
        found[name] = value.detach().to("cpu", torch.float32, copy=True)
    return found


def neutral(config: Config, shapes: Shapes, base: nn.Module | None) -> dict[str, Tensor]:
    """Return the values with which tensors of an adapter have no effect; those without an entry have none at 0.

    errors  LoadError as `peft_initial`, and for methods that have no such value
    """
    if shapes and config.get("peft_type") in NO_ZERO:
        found = f"{next(iter(shapes))} of {config.get('peft_type')}, which the expert lacks"
        rule = "a tensor that the expert lacks must have a value without effect, and this method has none"
        raise LoadError("peft model", found=found[:300], rule=rule, fix="call peft.get_peft_model with its config")
    return peft_initial(config, shapes, base)


def of_the_base(config: Config, names: Iterable[str]) -> frozenset[str]:
    """Return the names that are tensors of the base, whole or by rows, and no parameters of the method."""
    check_config(config)
    table = STARTS[config["peft_type"]]
    return frozenset(name for name in names if _start(config, table, name)[1] is None)


def check_complete(config: Config, names: Collection[str], base: nn.Module | None) -> None:
    """Raise LoadError where a layer lacks a parameter, or a saved module of the base a tensor."""
    groups = _TOGETHER.get(config["peft_type"], [])
    wanted = [name.removesuffix(ending) + other for group in groups for ending in group for name in names
              if name.endswith(f".{ending}") for other in group]  # fmt: skip
    saved = {} if base is None else saved_modules(base, config.get("modules_to_save") or ())
    wanted += [f"{PREFIX}{path}.{key}" for path, module in saved.items() for key in module.state_dict()]
    for name in sorted(set(wanted) - set(names)):
        rule = "a layer must have all its parameters, and a saved module all its tensors"
        raise LoadError(f"peft adapter at {name}"[:300], found="missing from the file", rule=rule,
                        fix="save it with peft again")  # fmt: skip


def _start(config: Config, table: Mapping[str, Start], name: str) -> tuple[str, Start | None]:
    """Return the path of a tensor's layer, and its start; for a tensor of the base, its whole path and None."""
    for ending, start in table.items():
        if name.endswith(f".{ending}") or name == ending:
            return name.removesuffix(ending).removesuffix(".").removeprefix(PREFIX), start
    if not name.startswith(PREFIX):
        raise _unknown(config, name)
    path, _, last = name.removeprefix(PREFIX).rpartition(".")
    for wrapper in _WRAPPERS:
        path = path.removesuffix(wrapper)
    return f"{path}.{last}".removeprefix("."), None


def _unknown(config: Config, name: str) -> LoadError:
    kind = config["peft_type"]
    rule = f"a tensor must be a parameter of {kind} ({', '.join(STARTS[kind]) or 'none'}) or belong to the base by its"
    rule += " path, because the initial value of others is not known"
    fix = "save it with save_projection=False, since projections are drawn again" if "save_projection" in config else ""
    return LoadError(
        f"peft adapter at {name}"[:300], found="an unknown tensor", rule=rule, fix=fix or "load it with peft"
    )


def _number(config: Config, field: str) -> float:
    value = config.get(field, _DEFAULTS[field])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LoadError("adapter_config.json", found=f"{field}={value!r}"[:200], rule=f"{field} must be a number",
                        fix="save it with peft again")  # fmt: skip
    return float(value)


def _of_base(base: nn.Module | None, config: Config, path: str, name: str) -> Tensor:
    """Return the base's value of one of its tensors, or of the rows that were trained."""
    if base is None:
        rule = f"it is no parameter of {config['peft_type']}, so it must belong to the base, which is needed"
        raise LoadError(
            f"peft adapter at {name}"[:300], found="no base", rule=rule, fix="pass base=MODEL (--base MODEL)"
        )
    for ending in _TOKENS:
        if path.endswith(f".{ending}"):
            module = path.removesuffix(f".{ending}")
            weight = _module(base, module, name).get_parameter("weight").detach()
            return weight[_rows(config, module, name, len(weight))]
    tensor = base_tensors(base).get(path)
    if tensor is None or not tensor.is_floating_point():
        raise _unknown(config, name)
    return tensor


def _rows(config: Config, path: str, name: str, most: int) -> list[int]:
    said = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(said, Mapping):
        said = next((rows for key, rows in said.items() if path == key or path.endswith(f".{key}")), None)
    if not isinstance(said, list) or not all(type(row) is int and 0 <= row < most for row in said):
        rule = f"the config must list the trained tokens of {path}, from 0 to {most - 1}"
        raise LoadError(
            f"peft adapter at {name}"[:300], found=f"tokens {said}"[:200], rule=rule, fix="save it with peft"
        )
    return said


def _module(base: nn.Module | None, path: str, name: str) -> nn.Module:
    if base is None:
        rule = "the base is needed, since the initial values are its weights"
        raise LoadError(f"task vector at {name}", found="no base", rule=rule, fix="pass base=MODEL (--base MODEL)")
    for within in (*(f"{path}{wrapper}" for wrapper in _WRAPPERS[:3]), path):  # as stock peft wraps it
        try:
            return base.get_submodule(within)
        except AttributeError:
            continue
    rule = "the base must contain the layers of the adapter"
    raise LoadError(f"task vector at {name}", found="no such layer in the base", rule=rule, fix="pass another base")


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model under their own names, without what peft put into it."""
    return named_tensors(model) if "peft" not in sys.modules else _unwrapped(model)


def _unwrapped(model: nn.Module) -> dict[str, Tensor]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    kept_part = {}
    for path, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            kept_part[f"{path}."] = "token_adapter.base_layer."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept_part[f"{path}."] = "original_module."
        elif isinstance(module, BaseTunerLayer):
            kept_part[f"{path}."] = "base_layer."
    found = {}
    for name, tensor in named_tensors(model).items():
        for path in (name[: at + 1] for at, letter in enumerate(name) if letter == "."):
            if path in kept_part:
                kept = name.startswith(path + kept_part[path])
                name = path + name.removeprefix(path + kept_part[path]) if kept else ""
                break
        if name:
            found[name] = tensor
    return found


def in_place(config: Config, names: Iterable[str]) -> list[str]:
    """Return the names of tensors that peft loads into the base itself: biases and embeddings that are no copies."""
    table, found = STARTS[config["peft_type"]], []
    for name in names:
        path, start = _start(config, table, name)
        if start is None and not _copied(config, path, name):
            found.append(name)
    return found


def has_tokens(names: Iterable[str]) -> bool:
    """Return whether one of the tensors holds trained rows of an embedding."""
    return any(name.endswith(_TOKENS) for name in names)


def needs_base(config: Config, names: Iterable[str]) -> bool:
    """Return whether an initial value is computed from the base's weights."""
    check_config(config)
    table = STARTS[config["peft_type"]]
    return any(start is None or callable(start) for _, start in (_start(config, table, name) for name in names))


def without_twins(config: Config, names: Iterable[str], base: nn.Module | None) -> dict[str, str]:
    """Return name -> an earlier name of the same tensor of the base, which peft saved under both.

    A module of modules_to_save is a copy in peft, and shares no memory with another. It is stored twice, with
    "modules_to_save" in its path too, if embeddings were saved.
    """
    names = sorted(names)
    copies = {name: name.replace(".modules_to_save.", ".") for name in names if ".modules_to_save." in name}
    found = {name: twin for name, twin in copies.items() if twin in names}
    table, tensors = STARTS[config["peft_type"]], {} if base is None else base_tensors(base)
    seen: dict[str, Tensor] = {}
    for name in names:
        path, start = _start(config, table, name)
        if start is None and path in tensors and name not in found and not _copied(config, path, name):
            twin = next((other for other, tensor in seen.items() if share_memory(tensor, tensors[path])), None)
            if twin is None:
                seen[name] = tensors[path]
            else:
                found[name] = twin
    return found


def _copied(config: Config, path: str, name: str) -> bool:
    """Return whether peft trains a copy of a tensor of the base: trained tokens, norms, and modules that it saves.

    These are the modules whose path ends with a name of modules_to_save. An original_module is the base's own.
    """
    if path.endswith(_TOKENS) or ".ln_tuning_layers." in name:
        return True
    ends, parts = tuple(config.get("modules_to_save") or ()), path.split(".")
    saved = bool(ends) and any(".".join(parts[:at]).endswith(ends) for at in range(1, len(parts)))
    return saved and ".original_module." not in name


def check_config(config: Config) -> None:
    """Raise LoadError for an adapter that its tensors do not describe: what `import_peft` refuses for that reason.

    It changes the base whenever it is loaded (PiSSA, OLoRA, CorDA, LoftQ), starts at numbers that no file contains
    (MiCA, prompts of a text), has a method whose starts are not known, or a field that peft does not have.
    """
    where, fix, kind = "adapter_config.json", "load it with peft", config.get("peft_type")
    if not isinstance(kind, str) or kind not in STARTS:
        rule = f"the initial values of the method must be known, as those of {', '.join(sorted(STARTS))}"
        raise LoadError(where, found=f"peft_type {kind!r}"[:200], rule=rule, fix=fix)
    initial = config.get("init_lora_weights", True)
    if kind in ("LORA", "ADALORA") and initial not in BASE_UNCHANGED:
        fix = "convert it to plain LoRA with peft: save_pretrained(path_initial_model_for_weight_conversion=...)"
        rule = "an adapter must leave the base as it is, and peft changes the base's weights when it loads this one"
        raise LoadError(where, found=f"init_lora_weights={initial!r}"[:200], rule=rule, fix=fix)
    if initial == "mica" or (kind == "PROMPT_TUNING" and config.get("prompt_tuning_init") == "TEXT"):
        field = "prompt_tuning_init" if kind == "PROMPT_TUNING" else "init_lora_weights"
        rule = "the initial values must be known or drawn at random, and these are computed from the base"
        raise LoadError(where, found=f"{field}={config[field]!r}", rule=rule, fix=fix)
    for name, value in config.items():
        if value and name not in _KNOWN and name not in peft_defaults(str(kind)):
            rule = f"every field must be one of peft's for {kind}, because others may change what it computes"
            raise LoadError(
                where, found=f"{name}={value!r}"[:200], rule=rule, fix=f"{fix}, or install its peft version"
            )


IGNORED = {
    # its origin and its training
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "ephemeral_gpu_offload",
    "eva_config", "inference_mode", "init_ia3_weights", "init_lora_weights", "init_weights", "loftq_config",
    "lora_ga_config", "peft_version", "revision", "runtime_config", "save_projection", "task_type",
    # the choice of its layers and their shapes, which the names and shapes of the tensors show
    "bias", "exclude_modules", "feedforward_modules", "layers_pattern", "layers_to_transform", "r", "rank_pattern",
    "target_modules", "target_parameters",
}  # fmt: skip
"""Fields of a config that do not change what its tensors mean; beside these, every field that names a dropout."""


def plain(config: Config) -> dict[str, Any]:
    """Return a live config as its adapter_config.json holds it."""
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.items()
    }


def difference(one: Config, two: Config, ignored: Collection[str] = ()) -> tuple[str, Any, Any] | None:
    """Return the first field in which two configs mean something different, and both values; None if they agree.

    A field that one of them lacks, since another version of peft wrote it, has the method's default there.
    """
    defaults = {}
    if one.keys() != two.keys() and one.get("peft_type") == two.get("peft_type"):
        defaults = peft_defaults(str(one.get("peft_type")))
    for key in dict.fromkeys([*one, *two]):
        if key in IGNORED or key in ignored or "dropout" in key:
            continue
        here, there = (config[key] if key in config else defaults.get(key) for config in (one, two))
        unknown = key not in defaults and not (
            key in one and key in two
        )  # of a later peft: off, as long as it is empty
        if _plain(here) != _plain(there) and (here or there or not unknown):
            return key, here, there
    return None


def _plain(value: Any) -> Any:
    """Return None for an empty value, which peft stores as empty or leaves out, and sorted lists of names."""
    if isinstance(value, Mapping | list | set | tuple) and not value:
        return None
    return getattr(value, "value", value)


_KNOWN = {*WITHOUT_EFFECT, *REASONS, *LoraConfig.model_fields, "lora_alpha", "use_dora"}
"""Fields that are known without an import of peft, which takes a second."""


@cache
def peft_defaults(kind: str) -> dict[str, Any]:
    """Return the fields of the installed peft's config of a method, with their defaults; {} for an unknown method."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)  # type: ignore[call-overload]
    found = {}
    for each in [] if made is None else dataclasses.fields(made):
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        found[each.name] = None if default is dataclasses.MISSING else default
    return found


def learned(names: Iterable[str]) -> list[str]:
    """Return the names without VeRA's projections, which are drawn from the config's key and never trained."""
    return [name for name in names if name not in _CONSTANTS]


def check_projections(config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Raise LoadError for VeRA projections that the config's key does not draw: an expert holds only the key."""
    stored = {name[-1]: tensor for name, tensor in tensors.items() if name in _CONSTANTS}
    if not stored:
        return
    try:
        a, b = stored["A"], stored["B"]
        drawn = VeRA(r=a.shape[0]).constants((b.shape[0], a.shape[1]), config["projection_prng_key"], torch.float32)
        same = all(torch.allclose(drawn[key].to(t.dtype).float(), t.float(), rtol=1e-2) for key, t in stored.items())
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError, DovetailError):
        same = False
    if not same:
        rule = "VeRA's projections must be those drawn from projection_prng_key: an expert does not hold them"
        raise LoadError("peft adapter", found="other projections", rule=rule)
