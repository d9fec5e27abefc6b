"""Recipes: one YAML file defines a run; unknown keys are errors, and every optional key has a default.

    model: playground
    chain: wanda(0.5) >> int(bits=4, group=64) >> lora(r=16) >> remask >> regrid
    data: {task: word_problems}

A recipe is untrusted: it is read with a size limit, without YAML's anchors and tags, and every key is checked.
`docs/recipes.md` lists all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from dovetail.chains.notation import chain
from dovetail.errors import RecipeError
from dovetail.files import refusal, write_whole
from dovetail.runs.yaml import read_yaml
from dovetail.tasks.spec import Data, Limit, Part, Positive, at_folder
from dovetail.training.settings import Training


class Calibration(Part):
    """The data of links that need activations: records of a split, or passages of a text file.

    text    a UTF-8 file, one passage a line, relative to the recipe; it takes precedence over `split`
    inputs  what a block is calibrated on: the outputs of the "compressed" blocks before it, or of the "original" ones
    """

    samples: Positive = 128
    split: Literal["train", "validation", "test"] = "train"
    text: Path | None = None
    inputs: Literal["compressed", "original"] = "compressed"


class Search(Part):
    """The search over ranks after training; each key is an argument of `dovetail.search_ranks`."""

    turns: Positive = 10
    neighbours: Positive = 8
    step: Positive = 2
    samples: Positive = 100
    split: Literal["train", "validation"] = "validation"


class Evaluation(Part):
    """The evaluation after each stage.

    tasks       further tasks besides the one that is trained: names of playground tasks, or data parts
    split       of every task; test where the data has one, else validation
    limit       score only this many records
    """

    tasks: tuple[Data, ...] = ()
    split: Literal["train", "validation", "test"] | None = None
    limit: Positive | None = None
    batch_size: Positive = 64


class Recipe(Part):
    """A run. Build it with `Recipe.load(path)` or `Recipe.parse(mapping)`; both raise RecipeError or ChainError.

    model   playground, a folder (relative to the recipe), a hub id, or package:NAME/FOLDER
    chain   the notation; kept in its canonical form
    search  search the ranks of the elastic adapters after training; None: no search
    merge   exact: CannotMerge before training starts if the chain cannot be merged without loss; lossy: merge anyway
            and measure the loss; none: keep the adapter apart
    output  folder of the run, relative to where the command is given
    """

    model: Annotated[str, Field(min_length=1)]
    chain: Annotated[str, Field(min_length=1)]
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
    output: Path | None = None

    @pydantic.field_validator("chain")
    @classmethod
    def _canonical(cls, text: str) -> str:
        return str(chain(text))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file; relative paths in it start from its folder."""
        path = Path(path)
        return cls.parse(read_yaml(path), where=str(path), folder=path.parent)

    @classmethod
    def parse(cls, value: Mapping[str, Any], *, where: str = "recipe", folder: str | Path = ".") -> Recipe:
        """Return the recipe of a mapping, in the form that YAML gives.

        where   the name of the recipe in messages
        folder  the start of relative paths
        """
        if not isinstance(value, Mapping):
            raise RecipeError(
                where, found=f"a {type(value).__name__}", rule="a recipe is a mapping: model, chain, data"
            )
        if "rows" in value and "chain" not in value:
            rule, fix = (
                "a recipe holds one run: model, chain, data",
                f"run the study: dovetail study {where} --output DIR",
            )
            raise RecipeError(where, found="a study: the key rows", rule=rule, fix=fix)
        try:
            return cls.model_validate(dict(value))._resolved(Path(folder))
        except pydantic.ValidationError as error:
            raise refusal(where, error, kind=RecipeError, keys=_keys, hints=_HINTS) from None

    def dump(self, path: str | Path) -> None:
        """Write the recipe with all defaults, atomically; the file repeats the run from any folder."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
        write_whole(Path(path), text)

    def _resolved(self, folder: Path) -> Recipe:
        """Make paths absolute, and fill in defaults that depend on other keys."""
        model = self.model
        if not model.startswith("package:") and model != "playground" and (folder / model).expanduser().is_dir():
            model = str((folder / Path(model).expanduser()).resolve())
        data = at_folder(self.data, folder)
        split = self.evaluate.split or ("validation" if data.task is None and data.test is None else "test")
        tasks = tuple(at_folder(task, folder) for task in self.evaluate.tasks)
        evaluate = self.evaluate.model_copy(update={"split": split, "tasks": tasks})
        text = self.calibration.text
        text = None if text is None else (folder / text.expanduser()).resolve()
        calibration = self.calibration.model_copy(update={"text": text})
        changed = {"model": model, "data": data, "evaluate": evaluate, "calibration": calibration}
        return self.model_copy(update=changed)


_HINTS = {"model": "model: playground", "chain": "chain: lora(r=16)", "data": "data: {task: word_problems}"}


def _keys(place: Sequence[int | str]) -> tuple[str, list[str]]:
    """Return the name of the part of a recipe at this place, and the keys that it knows."""
    parts: dict[str, type[pydantic.BaseModel]] = {
        "data": Data, "tasks": Data, "limit": Limit, "train": Training, "calibration": Calibration,
        "evaluate": Evaluation, "search": Search,
    }  # fmt: skip
    names = [part for part in place if isinstance(part, str) and part in parts]
    return (
        (".".join(map(str, place)), list(parts[names[-1]].model_fields))
        if names
        else ("a recipe", list(Recipe.model_fields))
    )
