"""A study file: its rows, its axes and what is compared.

    title: Sparse and tuned
    common: {model: playground, data: {task: word_problems}}
    seeds: [0, 1, 2]
    vary: {sparsity: [0.3, 0.5], train.max_steps: [100, 200]}
    rows:
      - {name: LoRA, chain: "wanda({sparsity}) >> lora(r=16)", with: {merge: lossy}}
      - {name: without tuning, of: LoRA, stage: pruned}

A row with a chain runs at every point of the axes that its chain names in braces and of those that are recipe keys. A
row with `of` runs nothing: it shows the model of another row at an earlier stage. `docs/study.md` lists the keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, StrictInt

from dovetail.errors import ChainError, RecipeError
from dovetail.runs.recipe import FROM, Recipe
from dovetail.runs.yaml import YamlFile, write_yaml
from dovetail.studies.axes import NONE, Axis, Value, braces, fill, get, has, labelled, put, within, without
from dovetail.tasks.spec import Part

Name = Annotated[str, Field(min_length=1, max_length=100)]
Seeds = Annotated[tuple[Annotated[StrictInt, Field(ge=0, lt=2**32)], ...], Field(min_length=1)]
Pattern = dict[str, Value | Annotated[tuple[Value, ...], Field(min_length=1)]]
_HELD = ("chain", "seed", "output")
"""The keys of a recipe that the study itself sets."""


class Row(Part, populate_by_name=True):
    """A row of the study: a recipe or a chain that is run, or a stage of the runs of another row.

    recipe   a recipe file, relative to the study file
    chain    a chain; {axis} stands for a value of that axis
    changes  (key `with`) recipe keys that hold in this row alone
    of       name of another row, whose runs this row shows
    stage    at which stage: base, pruned, quantized, tuned, merged
    """

    name: Name
    recipe: Path | None = None
    chain: str | None = None
    changes: dict[str, Any] = Field(default={}, alias="with")
    of: str | None = None
    stage: str | None = None

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> Row:
        named = [key for key in ("recipe", "chain", "of") if getattr(self, key) is not None]
        if len(named) != 1:
            raise ValueError("a row must have exactly one of recipe (a file), chain (its text) and of (another row)")
        if (self.of is None) != (self.stage is None):
            raise ValueError("of and stage must be given together: {of: LoRA, stage: pruned}")
        if self.of is not None and self.changes:
            raise ValueError("a row with of must not have with: it shows the runs of another row unchanged")
        return self


class Quick(Part):
    """A small part of a study, for a first look (`--quick`).

    vary    axis -> the labels of the values that are kept; other axes keep all
    seeds   in place of those of the study
    common  recipe keys that take precedence over all others
    """

    vary: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(default={})
    seeds: Seeds | None = None
    common: dict[str, Any] = Field(default={})


class Study(YamlFile):
    """A study file. Build it with `Study.load(path)` or `Study.parse(mapping)`.

    title    of the page
    common   recipe keys that hold in every row, whatever its recipe file says
    seeds    every row is run with each
    vary     axis -> its values, or label -> value. An axis is a name in braces in chains, or a recipe key
             (train.max_steps); each row runs at all combinations of the axes that its chain names and of the keys that
             its `with` does not set
    skip     points that are left out: axis -> a value or a list of values
    rows     the lines of the table, in order
    compare  a row name: every other row is compared with it; or {axis: value}: every other value of the axis is
             compared with that one; or pairs of row names: the score of the first row minus the score of the second
    cost     names of the rows whose storage, tuning and inference are measured
    quick    the part of the study that `quickly` keeps
    """

    title: Annotated[str, Field(min_length=1)]
    common: dict[str, Any] = Field(default={})
    seeds: Seeds = (0,)
    vary: dict[str, Axis] = Field(default={})
    skip: tuple[Pattern, ...] = ()
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    compare: str | dict[str, Value] | tuple[tuple[str, str], ...] = ()
    cost: tuple[str, ...] = ()
    quick: Quick | None = None

    @pydantic.field_validator("compare", mode="before")
    @classmethod
    def _row_or_pairs(cls, value: Any) -> Any:
        pairs = value if isinstance(value, list | tuple) else [value]
        named = isinstance(value, str) or (isinstance(value, Mapping) and len(value) == 1)
        if not named and not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            rule = "compare must be the name of a row, or {axis: value}, or pairs of names such as [[LoRA, DoRA]]"
            raise ValueError(rule)
        return value

    @property
    def compared(self) -> list[tuple[str, str]] | dict[str, Value]:
        """The pairs of rows under `compare`, with every other row where it names one; or the axis and its value."""
        if isinstance(self.compare, dict):
            return self.compare
        if isinstance(self.compare, str):
            return [(row.name, self.compare) for row in self.rows if row.name != self.compare]
        return list(self.compare)

    def dump(self, path: Path) -> None:
        """Write the study with the full recipe of every row, atomically; the file repeats the study from any folder."""
        write_yaml(path, self.model_dump(mode="json", by_alias=True, exclude_defaults=True))

    def quickly(self) -> Study:
        """Return the part of the study that its key `quick` keeps; RecipeError where it has none."""
        if self.quick is None:
            fix = "add quick: {vary: {AXIS: [VALUE]}, seeds: [0], common: {train: {max_steps: 20}}}"
            raise RecipeError("study", found="no key quick", rule="the study must say what --quick keeps", fix=fix)
        vary = dict(self.vary)
        for axis, kept in self.quick.vary.items():
            values = labelled(vary[axis])
            chosen = {str(label): values[label] for label in kept}
            vary[axis] = tuple(chosen.values()) if isinstance(vary[axis], tuple) else chosen
        rows = tuple(
            row if row.of is not None else row.model_copy(update={"changes": _over(row.changes, self.quick.common)})
            for row in self.rows
        )
        seeds = self.quick.seeds or self.seeds
        skip = tuple(kept for pattern in self.skip if (kept := within(pattern, vary)) is not None)
        changed: dict[str, Any] = {"vary": vary, "rows": rows, "seeds": seeds, "skip": skip, "quick": None}
        if isinstance(self.compare, dict) and within(self.compare, vary) is None:
            changed["compare"] = ()  # with a point that is left out
        return self.model_copy(update=changed)

    def axes(self, row: Row) -> list[str]:
        """Return the axes that a row runs along: those in its chain, and the keys that it does not set itself."""
        named, known = braces(row.chain), self._in_chains
        return [axis for axis in self.vary if (axis in named if axis in known else not has(row.changes, axis))]

    def keys_of(self, axes: Iterable[str]) -> list[str]:
        """Return the axes that are keys of a recipe, of these."""
        return [axis for axis in axes if axis not in self._in_chains]

    @property
    def _in_chains(self) -> set[str]:
        return {axis for row in self.rows for axis in braces(row.chain)}

    def _resolved(self, where: str, folder: Path) -> Study:
        _check_names(self, where)
        _check_axes(self, where)
        vary = {axis: _absolute(self, axis, where, folder) for axis in self.vary}
        rows = tuple(_resolved(row, self, where, folder) for row in self.rows)
        return self.model_copy(update={"rows": rows, "common": {}, "vary": vary})

    @classmethod
    def _keys(cls, place: Sequence[int | str]) -> tuple[str, list[str]]:
        parts: dict[int | str, tuple[str, type[Part]]] = {"rows": ("a row", Row), "quick": ("quick", Quick)}
        name, part = parts[place[0]] if place and place[0] in parts else ("a study", cls)
        return name, [field.alias or key for key, field in part.model_fields.items()]


def _check_names(study: Study, where: str) -> None:
    names = [row.name for row in study.rows]
    own = [row.name for row in study.rows if row.of is None]
    unique: dict[str, list[Any]] = {"rows": names, "seeds": list(study.seeds)}
    for place, values in unique.items():
        for value in values:
            if values.count(value) > 1:
                rule, fix = f"{place} must be unique", f"change or remove one of the two {place}"
                raise RecipeError(f"{where}, {place}", found=f"two {place} {value!r}", rule=rule, fix=fix)
    asked = [(f"rows, {row.name}, of", row.of, own) for row in study.rows if row.of is not None]
    pairs = [] if isinstance(study.compare, dict) else study.compared
    asked += [("compare", name, names) for pair in pairs for name in pair]
    asked += [("cost", name, own) for name in study.cost]
    for place, name, known in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            kind = "a row that runs a chain or a recipe" if known is own else "a row of the study"
            rule = f"this must be {kind}: {', '.join(known)}"
            fix = f"did you mean {near[0]}?" if near else "name one of these rows"
            raise RecipeError(f"{where}, {place}", found=repr(name), rule=rule, fix=fix)


def _check_axes(study: Study, where: str) -> None:
    """Check that every name in braces is an axis, and that every axis is named by some row or is a recipe key."""
    named = [axis for row in study.rows for axis in braces(row.chain)]
    for axis in named:
        if axis not in study.vary:
            rule = f"a name in braces must be an axis under vary: {', '.join(study.vary) or 'none'}"
            fix = f"add {axis} under vary"
            raise RecipeError(f"{where}, rows", found=f"{{{axis}}} in a chain", rule=rule, fix=fix)
    place = f"{where}, vary"
    for axis in study.vary:
        if axis in named:
            continue
        key = axis.partition(".")[0]
        if key not in Recipe.model_fields or key in ("chain", "output"):
            near = difflib.get_close_matches(axis, [*named, *Recipe.model_fields], n=1, cutoff=0.6)
            rule = (
                "an axis must be named in the chain of some row, in braces, or be a recipe key (data, train.max_steps)"
            )
            fix = f"did you mean {near[0]}?" if near else f"write {{{axis}}} in a chain"
            raise RecipeError(place, found=axis, rule=rule, fix=fix)
        if all(axis not in study.axes(row) for row in study.rows if row.of is None):
            rule = "an axis must be left open by some row"
            raise RecipeError(place, found=f"{axis}, which every row sets", rule=rule, fix=f"remove {axis} from with")
    if "seed" in study.keys_of(study.vary) and study.seeds != (0,):
        rule, fix = "seeds are given once", "remove seed under vary, or seeds"
        raise RecipeError(place, found="seed, beside seeds", rule=rule, fix=fix)
    patterns: list[tuple[str, Mapping[str, Any]]] = [("skip", pattern) for pattern in study.skip]
    if study.quick is not None:
        patterns.append(("quick, vary", study.quick.vary))
    if isinstance(study.compare, dict):
        patterns.append(("compare", study.compare))
    for part, pattern in patterns:
        for axis, values in pattern.items():
            if axis not in study.vary:
                rule = f"this must be an axis under vary: {', '.join(study.vary) or 'none'}"
                raise RecipeError(f"{where}, {part}", found=axis, rule=rule, fix=f"remove {axis}")
            known = list(labelled(study.vary[axis]))
            for value in values if isinstance(values, tuple) else (values,):
                if value not in known:
                    rule = f"this must be a value of the axis {axis}, or its label: " + ", ".join(map(str, known))
                    raise RecipeError(f"{where}, {part}", found=repr(value), rule=rule, fix="name one of these")


def _whole(
    row: Row, study: Study, values: Mapping[str, Any], where: str, folder: Path
) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a row at one point, with absolute paths, and the keys that it was made of.

    values   axis -> value; other axes take their first value that is not none
    """
    recipe = {} if row.recipe is None else Recipe.load(folder / row.recipe).model_dump(mode="json", exclude_unset=True)
    keys = _over(_over(recipe, study.common), row.changes) | {"chain": row.chain or recipe["chain"]}
    first = dict(values)
    for axis in study.axes(row):
        options = labelled(study.vary[axis]).values()
        first.setdefault(axis, next((value for value in options if value != NONE), NONE))
    for axis in study.keys_of(first):
        keys = put(keys, axis, first[axis])
    keys["chain"] = fill(keys["chain"], first)
    return parse_row(keys, where, folder), keys


def _resolved(row: Row, study: Study, where: str, folder: Path) -> Row:
    """Return the row with its chain and all other keys in `changes`: those of its file, common ones, its own."""
    if row.of is not None:
        return row
    for place, keys in (("common", study.common), (f"rows, {row.name}, with", row.changes)):
        for key in keys:
            if key in _HELD:
                rule = "the study must set seeds and chains, and it names the outputs"
                fix = f"remove {key}"
                raise RecipeError(f"{where}, {place}", found=f"key {key!r}", rule=rule, fix=fix)
    whole, keys = _whole(row, study, {}, f"{where}, row {row.name}", folder)
    values = whole.model_dump(mode="json", exclude_unset=True)
    changes = {key: value for key, value in values.items() if key not in _HELD}
    for part in ("data", "evaluate"):  # what a recipe finds out by itself may be another at another point
        if isinstance(keys.get(part), Mapping):
            changes[part] = {key: value for key, value in changes.get(part, {}).items() if key in keys[part]}
        elif part not in keys:
            changes.pop(part, None)
    if isinstance(keys.get("layers"), Mapping):  # the layers of a search depend on the chain, and so on the point
        changes["layers"] = _from_folder(keys["layers"], folder)
    for axis in study.keys_of(study.axes(row)):
        changes = without(changes, axis)
    return Row.model_validate({"name": row.name, "chain": row.chain or whole.chain, "with": changes})


def _from_folder(layers: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return `layers` of a recipe with an absolute path of the search that they are taken from."""
    return {key: str((folder / text).resolve()) if key == FROM else text for key, text in layers.items()}


def _absolute(study: Study, axis: str, where: str, folder: Path) -> tuple[Any, ...] | dict[str, Any]:
    """Return the values of an axis with absolute paths."""
    values = labelled(study.vary[axis])
    row = next((row for row in study.rows if row.of is None and axis in study.axes(row)), None)
    if axis in study._in_chains or row is None:
        return study.vary[axis]
    found = {}
    for name, value in values.items():
        whole, _ = _whole(row, study, {axis: value}, f"{where}, vary, {axis}, {name}", folder)
        keys = whole.model_dump(mode="json", exclude_unset=True)
        found[str(name)] = get(keys, axis) if has(keys, axis) else value
        if axis == "layers" and isinstance(value, Mapping):
            found[str(name)] = _from_folder(value, folder)
    if isinstance(study.vary[axis], tuple) and tuple(found.values()) == study.vary[axis]:
        return study.vary[axis]
    return found


def parse_row(keys: Mapping[str, Any], where: str, folder: Path) -> Recipe:
    """Parse a recipe; an error names the row."""
    try:
        return Recipe.parse(keys, where=where, folder=folder)
    except ChainError as error:
        said = {"found": error.found, "rule": error.rule, "fix": error.fix}
        raise ChainError(f"{where}, {error.where}", **said) from None


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of both; `above` takes precedence, in nested mappings key by key."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _over(found[key], value) if both else value
    return found
