"""What several runs share before they tune: quantized layers, and the scores of a base and of a quantized base.

    FOLDER/KEY.json          scores; KEY is a digest of the weights in use, the tokenizer, the records and the settings
    FOLDER/KEY.safetensors   quantized layers; KEY is a digest of the base, the quantizer of each layer, and the
                             calibration batches where the quantizer reads them

Both keys also cover the configuration of the model, the versions of the libraries, the device and the number of
threads. Equal keys mean equal inputs, bit for bit, so that a shared result is what the run would have computed. Where
several processes ask for the same result at the same time, one computes it and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.assignment import assign
from dovetail.chains.layer.fingerprint import packed_fingerprint
from dovetail.checkpoint.config import grid_of, held_in
from dovetail.compression.apply import quantized_state
from dovetail.files import atomic, open_tensors, read_json, write_whole
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Score, environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scored(pydantic.BaseModel, extra="forbid", frozen=True):
    """The scores of a model, task -> metric -> score, and its outputs for the first records of the task."""

    metrics: dict[str, dict[str, Score]]
    outputs: list[str]


class SharedScores:
    """The scores that the runs of one folder share.

    folder    made when the first score is written
    identity  what the scores depend on beside the weights: names of parts -> digests or texts
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._identity = "".join(f"{name}={value};" for name, value in sorted(identity.items()))

    def of(self, model: nn.Module, score: Callable[[], Scored]) -> Scored:
        """Return the scores of the model, from `score` where no run has computed them yet."""
        text = f"{self._identity}{packed_fingerprint(model)}"
        path = _path(self._folder, text, "json")
        with _alone(path):
            if path.exists():
                return read_json(path, Scored, rule="the file must hold scores that a run shared", fix="remove it")
            found = score()
            write_whole(path, found.model_dump_json())
            return found


class SharedBases:
    """The quantized layers that the runs of one folder share, as a context manager around `dovetail.apply`.

    Layers are shared where a quantizer is all that the first stage applies, and the adapter starts as the identity.

    folder    made when the first layers are written; None: nothing is shared
    recipe    of the run
    identity  of the run: digests of the model and of the calibration batches
    model     before its chain is applied
    """

    def __init__(
        self, folder: Path | None, recipe: Recipe, identity: Mapping[str, str], model: PreTrainedModel
    ) -> None:  # fmt: skip
        self.bases: dict[str, dict[str, Tensor]] | None = None
        """What an earlier run made, for `apply`."""
        self._path = None if folder is None else _path_of_layers(folder, recipe, identity, model)
        self._waiting = ExitStack()

    def __enter__(self) -> SharedBases:
        if self._path is not None:
            self._waiting.enter_context(_alone(self._path))
            self.bases = _read(self._path) if self._path.exists() else None
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.close()

    def made(self, model: nn.Module) -> None:
        """Write the layers of the model, which `apply` has just quantized, for the runs that wait for them."""
        if self._path is not None and not self._path.exists():
            state = quantized_state(model)
            tensors = {f"{name}/{part}": t.detach().clone() for name, of in state.items() for part, t in of.items()}
            with atomic(self._path) as file:
                save_file(tensors, file)
        self._path = None  # later stages are the run's own
        self._waiting.close()


def _path_of_layers(
    folder: Path, recipe: Recipe, identity: Mapping[str, str], model: PreTrainedModel
) -> Path | None:  # fmt: skip
    """Return the file of the layers that a run quantizes first; None where they are not shared."""
    assignment = assign(recipe.chain, recipe.layers, held_in(recipe.model, grid_of(recipe.chain)))
    stages = [links.stages[0] for links in assignment.chains]
    if any(len(stage.applied) != 1 or stage.quantizer is None or stage.decomposing for stage in stages):
        return None
    reads = any(stage.quantizer is not None and stage.quantizer.statistics for stage in stages)
    known = {
        **_surroundings(model),
        "model": identity["model"],
        "quantizers": [f"{stage.quantizer} {stage.keep_start}" for stage in stages],
        "calibration": [identity["calibration"], recipe.calibration.inputs] if reads else None,
        "patterns": list(assignment.layers),
        "recipe": recipe.model_dump(mode="json", include={"model", "dtype", "targets"}),
    }
    return _path(folder, json.dumps(known), "safetensors")


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    with open_tensors(path, owner="the folder of shared layers") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, part = key.rpartition("/")
            found.setdefault(name, {})[part] = file.get_tensor(key)
    return found


def _path(folder: Path, text: str, kind: str) -> Path:
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.{kind}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process ends
        yield


def scoring_identity(identity: Mapping[str, str], recipe: Recipe, model: PreTrainedModel) -> dict[str, str]:
    """Return what scores depend on beside the weights.

    identity  of the run: digests of the tokenizer and of the records
    recipe    its data and its evaluation
    model     its configuration, which its tensors do not tell
    """
    kept = {name: value for name, value in identity.items() if name == "tokenizer" or name.startswith("data of")}
    known = recipe.model_dump_json(include={"model", "dtype", "data", "evaluate"})
    return {**kept, **_surroundings(model), "recipe": known}


def _surroundings(model: PreTrainedModel) -> dict[str, str]:
    """Return what every result depends on beside tensors and data."""
    generation = model.generation_config.to_json_string() if model.can_generate() else ""
    config = model.config.to_json_string(use_diff=False)
    return {"config": config, "generation": generation, **environment(model)}
