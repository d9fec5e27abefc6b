"""Adapters that peft has too: how each of them names its tensors and its configuration in peft's format.

`dovetail.checkpoint.formats.peft` reads and writes the directories. It knows no method: what differs between the
methods is declared by the classes that derive from `PeftAdapter`, so an adapter of another package can join.
"""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic

from dovetail.chains.link import Adapter, Site
from dovetail.errors import LoadError

Rank = Annotated[int, pydantic.Field(ge=1)]
Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
T = TypeVar("T", int, float)

WITHOUT_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "feedforward_modules", "layers_pattern", "init_weights", "init_ia3_weights", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
    "use_effective_conv2d",
}  # fmt: skip
"""Fields that do not change what the adapter computes: its origin, its initial values, what the tensors show."""
REASONS = {
    "target_parameters": "it adapts parameters that no linear layer owns, such as fused experts",
    "trainable_token_indices": "it trains rows of the embedding, which is no linear layer",
    "layer_replication": "it repeats layers of the base, which makes another model",
    "lora_bias": "its B has a bias, and no link adds a bias to a layer",
    "alora_invocation_tokens": "it acts on some tokens alone, so it has no effective weight",
    "use_qalora": "its A acts on inputs averaged in groups",
}
"""Field -> why no link can follow it."""
_NAME = re.compile(r"\^?(?:[\w\-/ :]|\\[^\w]|\.)+\$?")
"""A pattern that is a name. It has no repetition and no alternative, so matching takes no time."""


class PeftConfig(pydantic.BaseModel, extra="allow"):
    """The fields of an adapter_config.json that Dovetail reads, with peft's defaults.

    A method's configuration derives from this class and adds the fields that change what the method computes. Fields
    that no class declares are left in `model_extra`.
    """

    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: Any = None
    exclude_modules: Any = None
    bias: str = "none"

    def check(self, where: str) -> None:
        """Raise LoadError for a field that no link can follow."""
        for name, value in (self.model_extra or {}).items():
            if value and name not in WITHOUT_EFFECT:
                rule = REASONS.get(name, "no link supports this field")
                raise LoadError(where, found=f"{name}={value!r}"[:200], rule=rule, fix="load it with peft")
        if self.bias != "none":
            rule = "it trained biases of the base too, and no link adds a bias to a layer"
            raise LoadError(where, found=f"bias={self.bias!r}"[:200], rule=rule, fix="load it with peft")

    @property
    def stores_constants(self) -> bool:
        """Whether the file must contain the tensors of `PeftAdapter.peft_constants`."""
        return True


@dataclass(frozen=True)
class PeftLink:
    """The link for all layers of a peft adapter, and what differs between the layers.

    link     elastic where the layers have several ranks
    ranks    layer -> its rank, for an elastic link
    factors  layer -> name of a parameter -> the number that multiplies its values
    kept     layer -> which of its ranks the file has, for a link whose other ranks are zeros there; of a layer without
             an entry, all
    """

    link: Adapter
    ranks: Mapping[str, int] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    kept: Mapping[str, Sequence[bool]] = field(default_factory=dict)


class PeftAdapter(Adapter):
    """An adapter that can be exported to peft and imported from it."""

    peft_type: ClassVar[str]
    """peft's name of the method, as in adapter_config.json: "LORA"."""
    peft_variant: ClassVar[str] = ""
    """The boolean field that selects this method among those of one `peft_type`: "use_dora"."""
    peft_tensors: ClassVar[Mapping[str, str]]
    """Name of a parameter -> peft's name of it, which follows the layer's path."""
    peft_constants: ClassVar[Mapping[str, str]] = {}
    """Name of a constant -> peft's full name of the tensor."""
    peft_config: ClassVar[type[PeftConfig]]
    """The fields that `from_peft` reads."""
    peft_conv1d: ClassVar[bool] = True
    """Whether peft supports the method on transformers' Conv1D."""

    @classmethod
    def peft_names(cls, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Return name of a parameter -> peft's name, for the tensors that a file has of one layer.

        shapes  peft's name -> shape
        """
        return {ours: theirs for ours, theirs in cls.peft_tensors.items() if theirs in shapes}

    @classmethod
    def peft_shape(cls, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a parameter in peft's file."""
        return shape

    @classmethod
    @abstractmethod
    def to_peft(cls, links: Mapping[Site, Any], *, seed: int, where: str) -> dict[str, Any]:
        """Return the arguments of peft's configuration class that describe these layers.

        links   layer -> the link that runs there, without elastic ranks
        seed    the run's seed
        where   the place that an error names
        errors  ChainError for what peft cannot express
        """

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Any, layers: Mapping[Site, Collection[str]], *, where: str) -> PeftLink:
        """Return the link that computes what a peft adapter computes.

        config  a `peft_config`, checked
        layers  layer -> names of the parameters that the file has for it
        where   the place that an error or warning names
        errors  LoadError for what no link can express
        """


def name_layers(names: Iterable[str], others: Iterable[str], before: str = "") -> list[str] | str:
    """Return the layers as peft accepts them: a list, or a regular expression where a list would match other layers.

    before  the text that peft requires before the end of a path: "" or "."
    """
    names = list(names)
    ends = tuple(before + name for name in names)
    if ends and any((before + other).endswith(ends) for other in others):
        return "|".join(map(re.escape, names))
    return names


def match_patterns(where: str, patterns: Mapping[str, T], layers: Iterable[str], default: T) -> dict[str, T]:
    """Return layer -> value of the first pattern that matches its path, or a part of it after a dot, as peft does.

    Patterns are regular expressions from outside, so only those are accepted that are the end of a path.
    """
    found: dict[str, T] = {}
    layers = list(layers)
    for pattern, value in patterns.items():
        if not _NAME.fullmatch(pattern):
            rule = "a pattern must be the end of a layer's path; other regular expressions of a file are not run"
            raise LoadError(where, found=f"pattern {pattern!r}"[:200], rule=rule, fix="list the layers one by one")
        try:
            compiled = re.compile(rf"(?:.*\.)?(?:{pattern})$")
        except re.error as error:
            said, fix = f"pattern {pattern!r}: {error}"[:200], "list the layers one by one"
            raise LoadError(where, found=said, rule="a pattern must be the end of a layer's path", fix=fix) from None
        for name in layers:
            if name not in found and compiled.match(name):
                found[name] = value
    return {name: found.get(name, default) for name in layers}


def warn_of_dropout(where: str, link: str, **probabilities: float) -> None:
    """Warn of dropout that the link does not have. Dropout acts in training only, so the adapter computes the same."""
    for name, probability in probabilities.items():
        if probability:
            warnings.warn(f"{where}: {name}={probability} is ignored, {link} has no such dropout", stacklevel=5)
