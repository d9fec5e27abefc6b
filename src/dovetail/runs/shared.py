"""Scores of untuned models that several runs share: a base and a quantized base are scored once.

    FOLDER/KEY.json    KEY is a digest of the weights in use, the tokenizer, the records, and how they are scored

Equal keys mean equal weights and equal records, bit for bit, so that a shared score is the score that the run would
have computed. Where several processes ask for the same score at the same time, one computes it and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pydantic
from torch import nn

from dovetail.chains.layer.fingerprint import packed_fingerprint
from dovetail.files import read_json, write_whole
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Score


class Scored(pydantic.BaseModel, extra="forbid", frozen=True):
    """The scores of a model, task -> metric -> score, and its outputs for the first records of the task."""

    metrics: dict[str, dict[str, Score]]
    outputs: list[str]


class SharedScores:
    """The scores that the runs of one folder share.

    folder    made when the first score is written
    identity  what the scores depend on beside the weights: names of parts -> digests
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._identity = "".join(f"{name}={value};" for name, value in sorted(identity.items()))

    def of(self, model: nn.Module, score: Callable[[], Scored]) -> Scored:
        """Return the scores of the model, from `score` where no run has computed them yet."""
        text = f"{self._identity}{packed_fingerprint(model)};{next(model.parameters()).device.type}"
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f".{path.stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process ends
            if path.exists():
                return read_json(path, Scored, rule="the file must hold scores that a run shared", fix="remove it")
            found = score()
            write_whole(path, found.model_dump_json())
            return found


def scoring_identity(identity: Mapping[str, str], recipe: Recipe) -> dict[str, str]:
    """Return what scores depend on beside the weights.

    identity  of the run: digests of the tokenizer and of the records
    recipe    its model, whose config tensors do not tell, its data and its evaluation
    """
    kept = {name: value for name, value in identity.items() if name == "tokenizer" or name.startswith("data of")}
    return {**kept, "recipe": recipe.model_dump_json(include={"model", "dtype", "data", "evaluate"})}
