"""The base model of a task vector, loaded as it was when the vector was trained on it: its head and its dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.checkpoint.formats.peft.write import CLASSIFIER_HEADS
from dovetail.checkpoint.load import DTYPES, load
from dovetail.experts.expert import Expert
from dovetail.experts.vectors import TaskVector, specs_of

_PREFIXES = ("head/", "base_model.model.")


def load_base(
    where: str | Path, shapes: Mapping[str, tuple[int, ...]], adapter: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base and its tokenizer.

    where    as for `dovetail.load`
    shapes   of the task vector: where it has a classifier's head, the base gets one of as many labels
    adapter  adapter.json, which says the dtype; None: as stored
    """
    outputs = []
    for name, shape in shapes.items():
        path = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
        if shape and path.split(".")[0] in CLASSIFIER_HEADS:
            outputs.append(shape[0])
    labels = min(outputs, default=0)  # of a head's layers, the last is the narrowest
    kind = "generation" if not labels else "regression" if labels == 1 else "classification"
    said = (adapter or {}).get("dtype")
    dtype = said if isinstance(said, str) and said in DTYPES else None
    return load(where, task_kind=kind, num_labels=labels if labels > 1 else None, dtype=dtype)


def base_of(source: Expert | TaskVector, where: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_base` for an expert or a task vector."""
    shapes = source.shapes if isinstance(source, Expert) else {n: spec.shape for n, spec in specs_of(source).items()}
    return load_base(where, shapes, source.origin.adapter)
