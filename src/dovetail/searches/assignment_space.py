"""The assignments of a search over layers: the choices of each unit, what they cost, and the budget.

    choice      the index of a value for each key of the space, such as (2, 1) for bits 4 and ranks 4
    assignment  a choice for each unit; as parameters of a trial "UNIT/KEY" -> value, as a recipe `layers`

Sizes are counted from the model's configuration, exactly as `dovetail.plan` counts them, without a pass over the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from dovetail.chains.assignment import assign
from dovetail.chains.check import check, check_merge
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.held import held
from dovetail.chains.layer.linear import adapter_dtype
from dovetail.chains.link import Adapter, Chain, Quantizer, arguments, format_value, with_arguments
from dovetail.chains.notation import chain
from dovetail.chains.stages import CheckedChain
from dovetail.checkpoint.config import grid_of, held_in
from dovetail.checkpoint.footprint import stored_nbytes
from dovetail.compression.apply import apply_on_meta
from dovetail.errors import ChainError, SearchError
from dovetail.models.targets import find_targets, matches
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import TaskInfo
from dovetail.runs.search_settings import LayerSettings
from dovetail.searches.space import Candidate
from dovetail.searches.task_space import TaskSpace
from dovetail.searches.trial import check_one_stage
from dovetail.searches.units import Unit, units

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import CategoricalDistribution

Choice = tuple[int, ...]
"""The index of a value for each key of the space."""


@dataclass(frozen=True)
class Size:
    """What layers store with one choice.

    weight_nbytes   of the pruned and quantized weights, with masks
    nbytes          with adapters, and all else
    parameters      trained
    """

    weight_nbytes: int
    nbytes: int
    parameters: int


class AssignmentSpace(TaskSpace):
    """The assignments of a recipe (`dovetail.runs.search_settings.LayerSettings`).

    chain         of the recipe; that of a unit has the values of its choice
    units         the layers that share their arguments
    choices       of every unit
    fixed_layers  layer -> chain, of the layers that are not searched
    sizes         (unit, choice) -> what its layers store
    """

    settings: LayerSettings

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.search, LayerSettings)
        self.settings = recipe.search
        assignment = assign(recipe.chain, recipe.layers, held_in(recipe.model, grid_of(recipe.chain)))
        self.chain = assignment.chain
        check_one_stage(assignment)
        if recipe.merge == "exact":
            check_merge(self.chain)
        self.task = TaskInfo.of(self.search_task, "validation", self.settings.samples)
        self.keys = _keys(self.settings.space, self.chain)
        self._empty = self.empty_model()
        targets = find_targets(self._empty, recipe.targets)
        self.fixed_layers = self._fixed(targets)
        free = [target for target in targets if target.name not in self.fixed_layers]
        if not free:
            rule = "at least one target must be left to search"
            raise SearchError("search.fixed", found="every target", rule=rule, fix="remove a pattern of search.fixed")
        self.units = units(self._empty, free, self.settings.unit)
        apply_on_meta(self._empty, recipe.chain, recipe.targets)
        self.choices: list[Choice] = list(product(*(range(len(values)) for values in self.settings.space.values())))
        self._chains = {choice: self._chain_with(choice) for choice in self.choices}
        self.sizes = self._sizes()
        self._check_budget()

    # The space.

    def _fixed(self, targets: Sequence[Any]) -> dict[str, str]:
        """Return layer -> chain of the layers that `fixed` or the recipe's `layers` pin."""
        pinned = {**self.recipe.layers, **self.settings.fixed}
        assign(self.recipe.chain, pinned, self.chain.held).on(targets, lambda name: held(self._empty, name))
        return {
            target.name: str(chain(text))
            for pattern, text in pinned.items()
            for target in targets
            if matches(target, pattern)
        }

    def chain_of(self, choice: Choice) -> CheckedChain:
        """Return the chain of a layer with this choice."""
        return self._chains[choice]

    def _chain_with(self, choice: Choice) -> CheckedChain:
        """Return the chain with the values of a choice; ChainError for a value that an argument cannot have."""
        links = list(self.chain.links)
        try:
            for (key, values), index in zip(self.settings.space.items(), choice, strict=True):
                for place, argument in self.keys[key]:
                    links[place] = with_arguments(links[place], {argument: values[index]})
            return check(chain(str(Chain(tuple(links)))), self.chain.held)  # the notation checks the types
        except ChainError as error:
            where = f"search.space with {self.label(choice)}"
            raise ChainError(where, found=error.found, rule=error.rule, fix=error.fix) from None

    def _sizes(self) -> dict[tuple[str, Choice], Size]:
        """Return the size of each unit with each choice; ChainError where a choice cannot be used on a layer."""
        return {
            (unit.name, choice): _total(self._size(name, links) for name in unit.layers)
            for unit in self.units
            for choice, links in self._chains.items()
        }

    def _size(self, name: str, links: Chain) -> Size:
        """Return the size of a layer under a chain; ChainError where a link cannot be used on it."""
        record = applied(self._empty)
        layer = record.layers[name]
        checked = check(chain(str(links)), record.assignment.at(name).held)  # a layer may have another grid than others
        for link in checked:
            link.check(layer.site)
        o, i = layer.base.shape
        quantizer, stage = checked.quantizer, checked.stages[0]
        weight = o * i * layer.base.dtype.itemsize if quantizer is None else quantizer.stored_nbytes(layer.site)
        weight += o * -(-i // 8) if stage.keep_mask else 0
        parameters = sum(math.prod(s) for link in stage.adapters for s in link.parameter_shapes(layer.site).values())
        return Size(weight, weight + parameters * adapter_dtype(layer.base.dtype).itemsize, parameters)

    @cached_property
    def _outside(self) -> tuple[Size, int]:
        """What all candidates share, the layers that are fixed included; and the number of weights under the chain."""
        layers = applied(self._empty).layers
        fixed = _total(self._size(name, chain(text)) for name, text in self.fixed_layers.items())
        inside = [p for layer in layers.values() for p in layer.links.parameters()]
        chained = sum(stored_nbytes(layer.base) for layer in layers.values()) + sum(p.nbytes for p in inside)
        trained = sum(p.numel() for p in self._empty.parameters() if p.requires_grad) - sum(p.numel() for p in inside)
        rest = Size(0, stored_nbytes(self._empty) - chained, trained)
        return _total([fixed, rest]), sum(math.prod(layer.base.shape) for layer in layers.values())

    def size(self, choices: Sequence[Choice]) -> dict[str, float]:
        """Return nbytes, trainable_parameters and bits_per_weight of an assignment: a choice for each unit."""
        outside, weights = self._outside
        parts = (self.sizes[unit.name, choice] for unit, choice in zip(self.units, choices, strict=True))
        found = _total([outside, *parts])
        return {
            "nbytes": found.nbytes,
            "trainable_parameters": found.parameters,
            "bits_per_weight": 8 * found.weight_nbytes / weights,
        }

    def fits(self, choices: Sequence[Choice]) -> bool:
        """Return whether an assignment is within the budget."""
        return not self._exceeded(choices)

    def _exceeded(self, choices: Sequence[Choice]) -> list[str]:
        """Return the limits of the budget that an assignment exceeds."""
        found = self.size(choices)
        return [name for name, limit in self.settings.budget if limit is not None and found[name] > limit]

    def _check_budget(self) -> None:
        """Raise SearchError for a budget below the smallest assignment, or above the largest."""
        for name, limit in self.settings.budget:
            if limit is None:
                continue
            ends = [
                self.size([choose(self.choices, key=lambda c, u=unit: self.cost(u, c, name)) for unit in self.units])
                for choose in (min, max)
            ]
            least, most = (end[name] for end in ends)
            if not least <= limit <= most:
                rule = f"the smallest assignment has {least:,} and the largest {most:,}"  # all digits: both are legal
                fix = f"set search.budget.{name} from the one to the other, or leave it out"
                raise SearchError(f"search.budget.{name}", found=f"{limit:,}", rule=rule, fix=fix)

    def cost(self, unit: Unit, choice: Choice, name: str) -> float:
        """Return what a unit with a choice adds to a limit of the budget."""
        field = {"bits_per_weight": "weight_nbytes", "trainable_parameters": "parameters"}.get(name, "nbytes")
        return getattr(self.sizes[unit.name, choice], field)

    @property
    def limited(self) -> str:
        """The limit of the budget that the knapsack works with; bytes without a budget."""
        return next((name for name, limit in self.settings.budget if limit is not None), "nbytes")

    @property
    def limit(self) -> float | None:
        """What the units may cost of that limit; None without a budget."""
        limit = getattr(self.settings.budget, self.limited)
        if limit is None:
            return None
        outside, weights = self._outside
        shares = {"nbytes": limit - outside.nbytes, "trainable_parameters": limit - outside.parameters}
        return shares.get(self.limited, limit * weights / 8 - outside.weight_nbytes)

    # Parameters of a trial: a value for each unit and key.

    def params(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return an assignment as the parameters of a trial."""
        return {
            f"{unit.name}/{key}": values[index]
            for unit, choice in zip(self.units, choices, strict=True)
            for (key, values), index in zip(self.settings.space.items(), choice, strict=True)
        }

    def choices_of(self, params: Mapping[str, Any]) -> list[Choice]:
        """Return the choice of each unit; the reverse of `params`. A key with one value may be left out."""
        return [
            tuple(
                values.index(params.get(f"{unit.name}/{key}", values[0])) for key, values in self.settings.space.items()
            )
            for unit in self.units
        ]

    @property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        from optuna.distributions import CategoricalDistribution

        return {
            f"{unit.name}/{key}": CategoricalDistribution(values)
            for unit in self.units
            for key, values in self.settings.space.items()
        }

    def suggest(self, trial: optuna.Trial) -> None:
        for name, distribution in self.distributions.items():
            trial.suggest_categorical(name, distribution.choices)

    def repaired(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters, moved into the budget: the units that save most for their score step down first."""
        choices = self.choices_of(params)
        while over := self._exceeded(choices):
            steps = [
                (_differing(choice, smaller) > 1, self._loss(unit, smaller) - self._loss(unit, choice), place, smaller)
                for place, (unit, choice) in enumerate(zip(self.units, choices, strict=True))
                for smaller in self.choices
                if self._saves(unit, choice, smaller, over)
            ]
            *_, place, smaller = min(steps)
            choices[place] = smaller
        return {name: value for name, value in self.params(choices).items() if name in params}

    def _saves(self, unit: Unit, choice: Choice, smaller: Choice, over: Sequence[str]) -> bool:
        """Return whether a step lowers one of the limits that the assignment exceeds, and adds to no limit."""
        limits = [name for name, limit in self.settings.budget if limit is not None]
        added = {name: self.cost(unit, smaller, name) - self.cost(unit, choice, name) for name in limits}
        return max(added.values()) <= 0 and any(added[name] < 0 for name in over)

    def _loss(self, unit: Unit, choice: Choice) -> float:
        """Return the loss that the scores predict of a unit with a choice; without scores, by its bytes saved."""
        scores = self.prepared.get("scores")
        if scores:
            return scores[unit.name][self.choices.index(choice)]
        return -self.cost(unit, choice, "nbytes") / max(self.cost(unit, each, "nbytes") for each in self.choices)

    def layers_of(self, choices: Sequence[Choice]) -> dict[str, str]:
        """Return the `layers` of a recipe: the chain of each layer that differs from the recipe's chain."""
        common = str(self.chain)
        found = dict(self.fixed_layers)
        for unit, choice in zip(self.units, choices, strict=True):
            text = str(self.chain_of(choice))
            found |= dict.fromkeys(unit.layers, text)
        return {name: text for name, text in found.items() if text != common}

    def candidate_recipe(self, candidate: Candidate) -> Recipe:
        layers = self.layers_of(self.choices_of(candidate.params))
        calibration = self.recipe.calibration.model_copy(update={"inputs": "original"})
        changed = {"layers": layers, "search": None, "output": None, "calibration": calibration}
        return self.recipe.model_copy(update=changed)

    def label(self, choice: Choice) -> str:
        """Return a choice in words: "bits 4, ranks 8"."""
        return ", ".join(
            f"{key} {format_value(values[index])}"
            for (key, values), index in zip(self.settings.space.items(), choice, strict=True)
        )

    def uniform(self) -> list[list[Choice]]:
        """Return the assignments within the budget that give all units one choice, the smallest first.

        Arguments of adapters are those of the recipe, where the space has them, else those in the middle.
        """
        indices: list[Sequence[int]] = []
        for key, values in self.settings.space.items():
            links = [self.chain.links[place] for place, _ in self.keys[key]]
            if any(isinstance(link, Adapter) for link in links):
                own = arguments(links[0])[self.keys[key][0][1]]
                indices.append([values.index(own) if own in values else len(values) // 2])
            else:
                indices.append(range(len(values)))
        found = [[choice] * len(self.units) for choice in product(*indices)]
        return sorted(filter(self.fits, found), key=lambda choices: self.size(choices)["nbytes"])


def _keys(space: Mapping[str, Sequence[Any]], links: Chain) -> dict[str, list[tuple[int, str]]]:
    """Return key of the space -> the links that it changes, by place, and the argument; SearchError for an unknown one.

    "bits" is the argument of the quantizer, "ranks" that of every adapter with a rank; else LINK.ARGUMENT.
    """
    found = {}
    for key in space:
        name, _, argument = key.partition(".")
        if key == "bits":
            places = [(place, "bits") for place, link in enumerate(links) if isinstance(link, Quantizer)]
        elif key == "ranks":
            places = [(place, "r") for place, link in enumerate(links) if isinstance(link, Adapter)]
        else:
            places = [(place, argument) for place, link in enumerate(links) if link.name == name]
        places = [(place, each) for place, each in places if each in arguments(links.links[place])]
        if not places:
            what = {"bits": "a quantizer with the argument bits", "ranks": "an adapter with a rank"}
            raise SearchError(
                f"search.space.{key}",
                found=f"chain {links}",
                rule=f"the chain must have {what.get(key, f'a link {name} with the argument {argument}')}",
                fix="use int(bits=4) or gptq(bits=4)" if key == "bits" else f"remove {key} from search.space",
            )
        found[key] = places
    return found


def _total(sizes: Iterable[Size]) -> Size:
    listed = list(sizes)
    return Size(*(sum(getattr(one, field.name) for one in listed) for field in fields(Size)))


def _differing(one: Choice, other: Choice) -> int:
    """Return the number of keys to which two choices give different values."""
    return sum(a != b for a, b in zip(one, other, strict=True))
