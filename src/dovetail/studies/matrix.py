"""A study file, and its matrix of runs: rows x points of the axes x seeds.

    title: Sparse and tuned
    common: {model: playground, data: {task: word_problems}}
    seeds: [0, 1, 2]
    vary: {sparsity: [0.3, 0.5]}
    rows:
      - {name: LoRA, chain: "wanda({sparsity}) >> lora(r=16)", with: {merge: lossy}}
      - {name: without tuning, of: LoRA, stage: pruned}

A row with a chain runs at every point of the axes that its chain names in braces. A row with `of` runs nothing: it
shows the model of another row at an earlier stage. `docs/study.md` lists the keys.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, StrictFloat, StrictInt, StrictStr

from dovetail.errors import ChainError, RecipeError
from dovetail.runs.recipe import Recipe
from dovetail.runs.rows import row_names
from dovetail.runs.steps import checked_chain
from dovetail.runs.yaml import YamlFile, write_yaml
from dovetail.tasks.spec import Part

Value = StrictInt | StrictFloat | StrictStr
Name = Annotated[str, Field(min_length=1, max_length=100)]
_HELD = ("chain", "seed", "output")
"""The keys of a recipe that the study itself sets."""
_AXIS = re.compile(r"\{(\w+)\}")


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


class Study(YamlFile):
    """A study file. Build it with `Study.load(path)` or `Study.parse(mapping)`.

    title    of the page
    common   recipe keys that hold in every row, whatever its recipe file says
    seeds    every row is run with each
    vary     axis -> its values; each row runs at all combinations of the axes that its chain names
    rows     the lines of the table, in order
    compare  pairs of row names: the score of the first row minus the score of the second
    cost     names of the rows whose storage, tuning and inference are measured
    """

    title: Annotated[str, Field(min_length=1)]
    common: dict[str, Any] = Field(default={})
    seeds: Annotated[tuple[Annotated[StrictInt, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = (0,)
    vary: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(default={})
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    compare: tuple[tuple[str, str], ...] = ()
    cost: tuple[str, ...] = ()

    def dump(self, path: Path) -> None:
        """Write the study with the full recipe of every row, atomically; the file repeats the study from any folder."""
        write_yaml(path, self.model_dump(mode="json", by_alias=True, exclude_defaults=True))

    def _resolved(self, where: str, folder: Path) -> Study:
        _check_names(self, where)
        rows = tuple(_resolved(row, self, where, folder) for row in self.rows)
        return self.model_copy(update={"rows": rows, "common": {}})

    @classmethod
    def _keys(cls, place: Sequence[int | str]) -> tuple[str, list[str]]:
        name, part = ("a row", Row) if place and place[0] == "rows" else ("a study", cls)
        return name, [field.alias or key for key, field in part.model_fields.items()]


@dataclass(frozen=True)
class Run:
    """One run of the matrix; several lines may show it.

    slug  its folder's name
    """

    slug: str
    recipe: Recipe


@dataclass(frozen=True)
class Line:
    """A row at one point of the axes: a line of the table.

    point  axis -> value, of the axes that the row's chain names
    task   name of the task of its runs
    stage  whose scores the line shows; None: merged where merging is exact, else the last stage before
    runs   one for each seed, in order
    """

    row: str
    point: dict[str, Value]
    task: str
    stage: str | None
    runs: tuple[Run, ...]


def expand(study: Study) -> list[Line]:
    """Return the lines of a study, in order: rows, and the points of each. Equal recipes are one run.

    Raises RecipeError or ChainError for a row that is not a valid recipe at some point, and for an unknown stage.
    """
    known: dict[str, Run] = {}
    found: dict[str, list[Line]] = {row.name: _lines(study, row, known) for row in study.rows if row.of is None}
    for row in study.rows:
        if row.of is None:
            continue
        source = found[row.of]
        for line in source:
            stages = _stages(line.runs[0].recipe)
            if row.stage not in stages:
                rule = f"stage must be one of the stages of {row.of}: " + ", ".join(stages)
                raise RecipeError(f"row {row.name}", found=f"stage: {row.stage}", rule=rule, fix="name one of these")
        if row.stage == "base":  # the same at every point
            source = [replace(source[0], point={})]
        found[row.name] = [replace(line, row=row.name, stage=row.stage) for line in source]
    return [line for row in study.rows for line in found[row.name]]


def _stages(recipe: Recipe) -> list[str]:
    found = ["base", *row_names(checked_chain(recipe))]
    if recipe.search is not None:
        found.append("searched")
    if recipe.merge != "none":
        found.append("merged")
    return found


def label(row: str, point: Mapping[str, Value]) -> str:
    """Return the name of a line in words: `LoRA (sparsity 0.5)`."""
    where = ", ".join(f"{axis} {value}" for axis, value in point.items())
    return f"{row} ({where})" if where else row


def _lines(study: Study, row: Row, known: dict[str, Run]) -> list[Line]:
    text = row.chain or ""
    axes = [axis for axis in study.vary if axis in _AXIS.findall(text)]
    lines = []
    for values in itertools.product(*(study.vary[axis] for axis in axes)):
        point = dict(zip(axes, values, strict=True))
        filled = _AXIS.sub(lambda match, point=point: str(point[match[1]]), text)
        runs = []
        for seed in study.seeds:
            keys = row.changes | {"chain": filled, "seed": seed, "output": None}
            recipe = _parse(keys, f"row {label(row.name, point)}", Path())
            slug = "-".join([row.name, *(f"{axis}-{value}" for axis, value in point.items()), f"s{seed}"])
            run = Run(re.sub(r"[^a-z0-9.]+", "-", slug.lower()).strip("-."), recipe)
            runs.append(known.setdefault(recipe.model_dump_json(), run))
        data = runs[0].recipe.data
        lines.append(Line(row.name, point, data.task or data.name or "data", None, tuple(runs)))
    slugs = [run.slug for run in known.values()]
    if len(set(slugs)) < len(slugs):
        twice = next(slug for slug in slugs if slugs.count(slug) > 1)
        found, rule = f"a second run called {twice}", "names of rows and values must differ in their letters and digits"
        raise RecipeError(f"row {row.name}", found=found, rule=rule, fix="rename one of the rows")
    return lines


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
    asked += [("compare", name, names) for pair in study.compare for name in pair]
    asked += [("cost", name, own) for name in study.cost]
    for place, name, known in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            kind = "a row that runs a chain or a recipe" if known is own else "a row of the study"
            rule = f"this must be {kind}: {', '.join(known)}"
            fix = f"did you mean {near[0]}?" if near else "name one of these rows"
            raise RecipeError(f"{where}, {place}", found=repr(name), rule=rule, fix=fix)
    named = [axis for row in study.rows for axis in _AXIS.findall(row.chain or "")]
    for axis in [*named, *study.vary]:
        if axis not in study.vary:
            rule = f"a name in braces must be an axis under vary: {', '.join(study.vary) or 'none'}"
            fix = f"add {axis} under vary"
            raise RecipeError(f"{where}, rows", found=f"{{{axis}}} in a chain", rule=rule, fix=fix)
        if axis not in named:
            rule = "an axis must be named in the chain of some row"
            raise RecipeError(f"{where}, vary", found=axis, rule=rule, fix=f"write {{{axis}}} in a chain")


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
    recipe = {} if row.recipe is None else Recipe.load(folder / row.recipe).model_dump(mode="json", exclude_unset=True)
    text = row.chain if row.chain is not None else recipe["chain"]
    # Parsed once, at the first point of the axes, to make paths absolute.
    filled = _AXIS.sub(lambda match: str(study.vary[match[1]][0]), text)
    merged = _over(_over(recipe, study.common), row.changes) | {"chain": filled}
    whole = _parse(merged, f"{where}, row {row.name}", folder)
    values = whole.model_dump(mode="json", exclude_unset=True)
    changes = {key: value for key, value in values.items() if key not in _HELD}
    return Row.model_validate({"name": row.name, "chain": text, "with": changes})


def _parse(keys: Mapping[str, Any], where: str, folder: Path) -> Recipe:
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


def unique_runs(lines: list[Line]) -> Iterator[Run]:
    """Yield every run once, in the order of the table, all rows with the first seed before the second."""
    seen: set[str] = set()
    for runs in itertools.zip_longest(*(line.runs for line in lines)):
        for run in runs:
            if run is not None and run.slug not in seen:
                seen.add(run.slug)
                yield run
