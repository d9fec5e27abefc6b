"""What a peft adapter's adapter_config.json says, read without trusting it, and the link that says the same.

A field that changes what the adapter computes is read here or refused by name; WITHOUT_EFFECT lists those that don't.
Patterns in it are regular expressions from outside, so only those are taken that are a layer's name or the end of one.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from dovetail.chains.link import Adapter, Site
from dovetail.checkpoint.adapter import JSON_NBYTES
from dovetail.errors import LoadError
from dovetail.links.adapt import IA3, DoRA, LoHa, LoRA, VeRA

Rank = Annotated[int, pydantic.Field(ge=1)]
Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
T = TypeVar("T", int, float)


class _Config(pydantic.BaseModel, extra="allow"):
    """Fields of every method, with peft's defaults; what a method doesn't read is left in `model_extra`."""

    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: Any = None
    exclude_modules: Any = None


class LoraFile(_Config):
    """peft_type LORA: LoRA, rsLoRA and DoRA."""

    r: Rank = 8
    lora_alpha: Number = 8
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Number] = {}
    lora_dropout: Number = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True


class LohaFile(_Config):
    """peft_type LOHA."""

    r: Rank = 8
    alpha: Number = 8
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Number] = {}
    rank_dropout: Number = 0.0
    module_dropout: Number = 0.0


class VeraFile(_Config):
    """peft_type VERA."""

    r: Rank = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: Number = 0.0
    d_initial: Number = 0.1
    bias: str = "none"


class IA3File(_Config):
    """peft_type IA3. Which side a layer scales is read from its tensor's shape."""


AnyConfig = LoraFile | LohaFile | VeraFile | IA3File
METHODS: dict[str, type[AnyConfig]] = {"LORA": LoraFile, "LOHA": LohaFile, "VERA": VeraFile, "IA3": IA3File}

WITHOUT_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "feedforward_modules", "layers_pattern", "init_weights", "init_ia3_weights", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
    "use_effective_conv2d",
}  # fmt: skip
"""Not needed to compute what the adapter does: where it came from, how it began, what the tensors say themselves."""
BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of init_lora_weights with which peft leaves the base as it is when it loads the adapter."""
REASONS = {
    "target_parameters": "it adapts parameters that no linear layer owns, such as fused experts",
    "trainable_token_indices": "it trains rows of the embedding, which is no linear layer",
    "layer_replication": "it repeats layers of the base, so that the model is another one",
    "lora_bias": "B has a bias there, and no link adds one to a layer",
    "alora_invocation_tokens": "it acts on some tokens alone, so that no effective weight does the same",
    "use_qalora": "its A acts on inputs averaged in groups",
}
_LITERAL = re.compile(r"\^?(?:[\w\-/ :]|\\[^\w]|\.)+\$?")
"""A pattern that is a name: no repetition and no alternative, so that it takes no time to match."""


def read_config(path: Path) -> AnyConfig:
    """Reads and checks an adapter_config.json; LoadError names the field that Dovetail can't follow."""
    where = str(path)
    try:
        if path.stat().st_size > JSON_NBYTES:
            raise LoadError(where, found=f"{path.stat().st_size} bytes", rule=f"at most {JSON_NBYTES}")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        rule = "a peft adapter directory holds adapter_config.json"
        raise LoadError(where, found=error.strerror or str(error), rule=rule) from None
    except (ValueError, RecursionError) as error:
        raise LoadError(where, found=str(error)[:200], rule="adapter_config.json is JSON") from None
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in METHODS:
        found = f"peft_type {kind!r}"[:200] if isinstance(raw, dict) else f"a {type(raw).__name__}"
        raise LoadError(where, found=found, rule=f"Dovetail has links for {', '.join(METHODS)}")
    try:
        config = METHODS[kind].model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:100]
        raise LoadError(where, found=f"{place}: {first['msg']}", rule="adapter_config.json as peft writes it") from None
    _refuse_fields(where, config)
    return config


def _refuse_fields(where: str, config: AnyConfig) -> None:
    for field, value in (config.model_extra or {}).items():
        if value and field not in WITHOUT_EFFECT:
            rule = REASONS.get(field, "no link does what this field asks for")
            raise LoadError(where, found=f"{field}={value!r}"[:200], rule=rule, fix="load it with peft")
    if isinstance(config, LoraFile | VeraFile) and config.bias != "none":
        rule = "it trained biases of the base too, and no link adds one to a layer"
        raise LoadError(where, found=f"bias={config.bias!r}"[:200], rule=rule, fix="load it with peft")
    if isinstance(config, LoraFile) and config.init_lora_weights not in BASE_KEPT:
        raise LoadError(
            where,
            found=f"init_lora_weights={config.init_lora_weights!r}"[:200],
            rule="peft changes the base's weights again whenever it loads this adapter, so it isn't one on the base",
            fix="save it with save_pretrained(…, path_initial_model_for_weight_conversion=…) first; one from LoftQ "
            "belongs to the base that LoftQ saved, where init_lora_weights is true",
        )


@dataclass(frozen=True)
class Ranked:
    """A link for all layers, and what differs between them.

    link     elastic where layers have several ranks, which `ranks` then gives
    ranks    layer -> its rank
    factors  layer -> what to multiply its B (B1) with: its scale over the link's
    """

    link: Adapter
    ranks: dict[str, int]
    factors: dict[str, float]


def ranked(config: LoraFile | LohaFile, layers: list[str], where: str) -> Ranked:
    """The LoRA, DoRA or LoHa link of a config, for the layers with these paths."""
    alpha = config.lora_alpha if isinstance(config, LoraFile) else config.alpha
    rs = isinstance(config, LoraFile) and config.use_rslora
    ranks = _resolved(where, config.rank_pattern, layers, config.r)
    alphas = _resolved(where, config.alpha_pattern, layers, alpha)
    scales = {name: alphas[name] / (math.sqrt(ranks[name]) if rs else ranks[name]) for name in layers}
    # One link has one scale. Where layers have several, the others' B take up the difference.
    common, _ = Counter(scales.values()).most_common(1)[0]
    if not common:
        common = next((scale for scale in scales.values() if scale), 0.0)
    exact = all(scale == common for scale in scales.values())
    factors = {name: scale / common if common else 1.0 for name, scale in scales.items()}
    r = max(ranks.values())
    elastic = tuple(sorted(set(ranks.values()), reverse=True)) if len(set(ranks.values())) > 1 else ()
    is_dora = isinstance(config, LoraFile) and config.use_dora
    root = rs and not is_dora  # dora has no scaling of its own kind: its alpha says the scale
    one = exact and not elastic and root == rs
    alpha = alphas[layers[0]] if one else common * (math.sqrt(r) if root else r)
    if isinstance(config, LohaFile):
        _warn_dropout(where, "loha", rank_dropout=config.rank_dropout, module_dropout=config.module_dropout)
        return Ranked(LoHa(r=r, alpha=alpha, elastic=elastic), ranks, factors)
    if is_dora:
        _warn_dropout(where, "dora", lora_dropout=config.lora_dropout)
        return Ranked(DoRA(r=r, alpha=alpha, elastic=elastic), ranks, factors)
    scaling = "rs" if root else "linear"
    link = LoRA(r=r, alpha=alpha, dropout=config.lora_dropout, scaling=scaling, elastic=elastic)
    return Ranked(link, ranks, factors)


def _warn_dropout(where: str, link: str, **probabilities: float) -> None:
    """Dropout acts in training alone: without it the adapter computes the same, so that isn't refused."""
    for field, probability in probabilities.items():
        if probability:
            warnings.warn(f"{where}: {field}={probability} is left out, {link} has no dropout", stacklevel=4)


def vera(config: VeraFile) -> VeRA:
    """The VeRA link of a config."""
    return VeRA(r=config.r, d_initial=config.d_initial, seed=config.projection_prng_key, dropout=config.vera_dropout)


def ia3(sites: Mapping[str, Site], scales_inputs: Mapping[str, bool]) -> IA3:
    """The link that scales inputs of these layers and outputs of the others, written as shortly as it can be."""
    if all(inputs == sites[name].feedforward for name, inputs in scales_inputs.items()):
        return IA3()
    if all(scales_inputs.values()):
        return IA3(side="in")
    inputs = [name for name, yes in scales_inputs.items() if yes]
    # The same layers of all blocks, if that fits no other.
    short = IA3(side="out", inputs=tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in inputs)))
    fits = all(("in_scale" in short.parameter_shapes(sites[name])) == yes for name, yes in scales_inputs.items())
    return short if fits else IA3(side="out", inputs=tuple(inputs))


def _resolved(where: str, patterns: Mapping[str, T], layers: Iterable[str], default: T) -> dict[str, T]:
    """Layer -> value of the first pattern that fits it, as peft decides: the whole path, or its end after a dot."""
    found: dict[str, T] = {}
    layers = list(layers)
    for pattern, value in patterns.items():
        if not _LITERAL.fullmatch(pattern):
            rule = "a pattern is a layer's path or the end of one; other regular expressions from outside aren't run"
            raise LoadError(where, found=f"pattern {pattern!r}"[:200], rule=rule, fix="name the layers one by one")
        try:
            compiled = re.compile(rf"(?:.*\.)?(?:{pattern})$")
        except re.error as error:
            raise LoadError(where, found=f"pattern {pattern!r}: {error}"[:200], rule="a pattern is a name") from None
        for name in layers:
            if name not in found and compiled.match(name):
                found[name] = value
    return {name: found.get(name, default) for name in layers}
