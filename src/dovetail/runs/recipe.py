"""Recipes: one YAML file defines a run; unknown keys are errors, and every optional key has a default.

    model: playground
    chain: wanda(0.5) >> int(bits=4, group=64) >> lora(r=16) >> remask >> regrid
    data: {task: word_problems}

A recipe is untrusted: it is read with a size limit, without YAML's anchors and tags, and every key is checked.
`docs/recipes.md` lists all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from dovetail.chains.link import Chain, Link, arguments, with_arguments
from dovetail.chains.notation import chain
from dovetail.errors import RecipeError
from dovetail.models.locate import GGUF
from dovetail.runs.search_settings import SEARCHES, Budget, ChainSettings, RankSettings, Search
from dovetail.runs.yaml import YamlFile, read_yaml, write_yaml
from dovetail.tasks.rules import Scoring
from dovetail.tasks.spec import Data, Limit, Part, Positive, at_folder
from dovetail.training.settings import Training

FROM = "from"
"""The key of `layers` that names the file of a search."""


class Calibration(Part):
    """The data of links that need activations: records of a split, or passages of a text file.

    text    a UTF-8 file, one passage a line, relative to the recipe; it takes precedence over `split`
    inputs  what a block is calibrated on: the outputs of the "compressed" blocks before it, or of the "original" ones
    """

    samples: Positive = 128
    split: Literal["train", "validation", "test"] = "train"
    text: Path | None = None
    inputs: Literal["compressed", "original"] = "compressed"


class ExportSettings(Part):
    """An export at the end of the run (`dovetail.export`).

    to      the format
    output  name in the run's folder export/; by default the format, and for gguf model.gguf
    dtype   that the model is served in; by default the model's
    engine  vllm, transformers, ollama or openvino: refuse what it does not read
    like    for gguf, a file of the same model, relative to the recipe (`dovetail.export`)
    """

    to: Annotated[str, Field(min_length=1)]
    output: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    dtype: str | None = None
    engine: str | None = None
    like: Path | None = None

    @property
    def name(self) -> str:
        """The name of the folder or file."""
        return self.output or ("model.gguf" if self.to == "gguf" else self.to)


class Evaluation(Part):
    """The evaluation after each stage.

    tasks       further tasks besides the one that is trained: names of playground tasks, or data parts
    split       of every task; test where the data has one, else validation
    limit       score only this many records
    max_length  tokens of a scored row; fewer where the model has fewer positions
    """

    tasks: tuple[Data, ...] = ()
    split: Literal["train", "validation", "test"] | None = None
    limit: Positive | None = None
    batch_size: Positive = 64
    max_length: Positive = 1024


def read_layers(path: Path) -> dict[str, str]:
    """Return the chains of layers in a YAML file: the `layers` of a recipe, or a mapping of patterns to chains."""
    found = read_yaml(path)
    found = found.get("layers", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        rule = "the file must map patterns of layers to chains"
        raise RecipeError(str(path), found=f"{found!r}"[:200], rule=rule, fix='write a line as in down: "int(bits=8)"')
    return found


def searched_layers(path: Path, text: str) -> dict[str, str]:
    """Return the chains of layers that a search found, for another chain (QR-Adaptor, Table 6).

    path     the best.yaml of a search over layers, or another recipe with layers
    text     the chain that runs. Its links take the arguments in which the layers of the file differ from each other or
             from the chain of the file, where the file has the same link; all other arguments stay
    returns  pattern -> chain
    errors   RecipeError for a file without layers, and for one with other links; ChainError as the notation
    """
    found = read_yaml(path)
    rule, fix = "the file must be a recipe with chain and layers", "name the best.yaml of a search over layers"
    if not isinstance(found, dict) or not isinstance(found.get("chain"), str) or not found.get("layers"):
        raise RecipeError(f"layers from {path}", found="no chain with layers", rule=rule, fix=fix)
    common, own = _numbered(found["chain"]), {name: _numbered(each) for name, each in read_layers(path).items()}
    varied = {
        (key, name)
        for links in own.values()
        for key, link in links.items()
        for name, value in arguments(link).items()
        if key not in common or arguments(common[key])[name] != value
    }
    mine = _numbered(text)
    if not any(key in mine for key, _ in varied):
        named = ", ".join(sorted({key[0].name for key, _ in varied})) or "none"
        rule = "the chain must have a link whose arguments the file has for its layers"
        raise RecipeError(f"layers from {path}", found=f"layers that differ in {named}", rule=rule, fix=fix)
    layers = {}
    for pattern, links in own.items():
        changed = []
        for key, link in mine.items():
            taken = {name for which, name in varied if which == key and key in links}
            changed.append(with_arguments(link, {name: arguments(links[key])[name] for name in taken}))
        layers[pattern] = str(Chain(tuple(changed)))
    return layers


def _numbered(text: str) -> dict[tuple[type[Link], int], Link]:
    """Return the links of a chain, each by its class and its number among the links of that class."""
    found: dict[tuple[type[Link], int], Link] = {}
    for link in chain(text):
        found[type(link), sum(kind is type(link) for kind, _ in found)] = link
    return found


def _is_local(path: Path) -> bool:
    """Return whether a path is a model's folder or a GGUF file, and not the name of a model on the hub."""
    path = path.expanduser()
    return path.is_dir() or (path.suffix.lower() == GGUF and path.is_file())


class Recipe(YamlFile):
    """A run. Build it with `Recipe.load(path)` or `Recipe.parse(mapping)`.

    model   playground, a folder or a .gguf file (relative to the recipe), a hub id, or package:NAME/FOLDER
    chain   the notation; kept in its canonical form. Left out where `search` searches chains
    layers  pattern of layers -> the same chain with other arguments; of several patterns that fit, the last decides.
            {from: FILE} takes what a search found (`searched_layers`)
    search  what to search; None: no search
    merge   exact: CannotMerge before training starts if the chain cannot be merged without loss; lossy: merge anyway
            and measure the loss; none: keep the adapter apart. Where a recipe names exact, a chain that gives up the
            zeros or the grid of a merged model is refused too; else (or with null) it runs, and the report says what it
            gave up
    export  formats to write at the end, which are checked before training: one mapping, or several
    output  folder of the run, relative to where the command is given
    """

    model: Annotated[str, Field(min_length=1)]
    chain: str
    layers: dict[str, str] = Field({})
    targets: str | tuple[str, ...] = "all-linear"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    trust_remote_code: bool = False
    data: Data
    train: Training = Training()
    calibration: Calibration = Calibration()
    evaluate: Evaluation = Evaluation()
    search: Search | None = None
    merge: Literal["exact", "lossy", "none"] = "exact"
    export: tuple[ExportSettings, ...] = ()
    output: Path | None = None

    @pydantic.field_validator("export", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @pydantic.field_validator("export")
    @classmethod
    def _names(cls, value: tuple[ExportSettings, ...]) -> tuple[ExportSettings, ...]:
        if len({each.name for each in value}) < len(value):
            raise ValueError("exports must have names of their own: set output")
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _searched(cls, value: Any) -> Any:
        search = value.get("search") if isinstance(value, dict) else None
        chains = isinstance(search, dict) and search.get("kind") == "chains"
        return {"chain": "", **value} if chains else value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _unnamed(cls, value: Any) -> Any:
        unnamed = isinstance(value, dict) and value.get("merge", "exact") is None
        return {key: each for key, each in value.items() if key != "merge"} if unnamed else value

    @pydantic.field_validator("chain")
    @classmethod
    def _canonical(cls, text: str) -> str:
        return str(chain(text)) if text else ""

    @pydantic.field_validator("layers")
    @classmethod
    def _canonical_layers(cls, layers: dict[str, str]) -> dict[str, str]:
        return {pattern: text if pattern == FROM else str(chain(text)) for pattern, text in layers.items()}

    @pydantic.model_validator(mode="after")
    def _one_chain(self) -> Recipe:
        if isinstance(self.search, ChainSettings):
            if self.chain or self.layers:
                raise ValueError("a search over chains must have no chain and no layers: use search.prefix")
        elif not self.chain:
            raise ValueError("chain must not be empty, such as chain: lora(r=16)")
        return self

    def dump(self, path: str | Path) -> None:
        """Write the recipe with all defaults, atomically; the file repeats the run from any folder."""
        unnamed = {"merge": None} if self.merge == "exact" and not self.names_exact else {}
        write_yaml(Path(path), self.model_dump(mode="json") | unnamed)

    @property
    def names_exact(self) -> bool:
        """Whether the recipe says `merge: exact` itself."""
        return self.merge == "exact" and "merge" in self.model_fields_set

    def difference(self, other: Recipe) -> tuple[str, Any, Any] | None:
        """Return the first key to which two recipes give different values, and both values; outputs do not count."""
        key, mine, theirs = "", *(each.model_dump(mode="json", exclude={"output"}) for each in (self, other))
        while mine != theirs and isinstance(mine, dict) and isinstance(theirs, dict):
            name = next(name for name in [*mine, *theirs] if mine.get(name) != theirs.get(name))
            key, mine, theirs = f"{key}.{name}", mine.get(name), theirs.get(name)
        return (key[1:], mine, theirs) if key else None

    def _resolved(self, where: str, folder: Path) -> Recipe:
        model = self.model
        if not model.startswith("package:") and model != "playground" and _is_local(folder / model):
            model = str((folder / Path(model).expanduser()).resolve())
        data = at_folder(self.data, folder)
        split = self.evaluate.split or ("validation" if data.task is None and data.test is None else "test")
        tasks = tuple(at_folder(task, folder) for task in self.evaluate.tasks)
        evaluate = self.evaluate.model_copy(update={"split": split, "tasks": tasks})
        text = self.calibration.text
        text = None if text is None else (folder / text.expanduser()).resolve()
        calibration = self.calibration.model_copy(update={"text": text})
        layers = dict(self.layers)
        if (source := layers.pop(FROM, None)) is not None:
            layers = {**searched_layers((folder / Path(source).expanduser()).resolve(), self.chain), **layers}
        export = tuple(
            each if each.like is None else each.model_copy(update={"like": (folder / each.like.expanduser()).resolve()})
            for each in self.export
        )
        changed: dict[str, Any] = {"layers": layers, "model": model, "data": data, "evaluate": evaluate}
        changed |= {"calibration": calibration, "export": export}
        return self.model_copy(update=changed)

    @classmethod
    def _keys(cls, place: Sequence[int | str]) -> tuple[str, list[str]]:
        parts: dict[int | str, type[pydantic.BaseModel]] = {
            "data": Data, "tasks": Data, "limit": Limit, "scoring": Scoring, "train": Training,
            "calibration": Calibration, "evaluate": Evaluation, "search": RankSettings, "budget": Budget, **SEARCHES,
            "export": ExportSettings,
        }  # fmt: skip
        names = [part for part in place if part in parts]
        if not names:
            return "a recipe", list(cls.model_fields)
        return ".".join(map(str, place)), list(parts[names[-1]].model_fields)
