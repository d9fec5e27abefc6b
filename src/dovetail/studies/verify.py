"""What a line of a study reports of a finished run: whether it is mergeable, verified by merging, and its precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic
from safetensors import safe_open

from dovetail.chains.link import Quantizer, arguments
from dovetail.chains.notation import chain
from dovetail.checkpoint.adapter import load_adapter
from dovetail.checkpoint.config import grid_of
from dovetail.checkpoint.merge import MergeReport, merge
from dovetail.errors import CannotMerge
from dovetail.files import read_json, write_whole
from dovetail.runs.folder import ADAPTER, RECIPE
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Merge, Report
from dovetail.runs.steps import checked_chain, load_base
from dovetail.tasks.find import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MERGED = "merged"
_PRECISION = {"float64": "FP64", "float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
_STORED = {"F64": "FP64", "F32": "FP32", "BF16": "BF16", "F16": "FP16"}


class Judgement(pydantic.BaseModel, extra="forbid", frozen=True):
    """Whether the model of a run merges without loss (None: nothing was tuned), and the reason where it does not."""

    mergeable: bool | None
    why: str


def check_mergeable(folder: Path, kept: Path) -> Judgement:
    """Verify by merging whether a run merges without loss.

    folder  a run directory; where its recipe asks for an exact merge, the merge of the run itself counts
    kept    file of an earlier answer, read where it exists and else written
    """
    if kept.exists():
        return read_json(kept, Judgement, rule="the file must hold the answer that Dovetail kept", fix="remove it")
    found = _verify(folder)
    kept.parent.mkdir(exist_ok=True)
    write_whole(kept, found.model_dump_json(indent=2) + "\n")
    return found


def _verify(folder: Path) -> Judgement:
    report, recipe = Report.load(folder), Recipe.load(folder / RECIPE)
    if not any(link.kind == "adapter" for link in chain(report.chain)):
        return Judgement(mergeable=None, why="")
    if recipe.merge == "exact" and report.merge is not None:
        before, after = report.score(report.row(last_stage(report))), report.score(report.row(MERGED))
        if before is None or after is None:
            return Judgement(
                mergeable=False, why="a score before or after merging is not finite, so none can be compared"
            )
        if before != after:
            return Judgement(mergeable=False, why=f"merging changes the score from {before} to {after}")
        return _lossless(report.merge)
    model, _ = tuned(folder)
    try:
        return _lossless(merge(model))
    except CannotMerge as error:
        return Judgement(mergeable=False, why=error.found)


def _lossless(merged: Merge | MergeReport) -> Judgement:
    """Require equality in every weight, every logit of the probe, and every zero."""
    if not merged.exact:
        return Judgement(mergeable=False, why=f"merging changes weights by up to {merged.max_abs_weight_diff:.2g}")
    if merged.max_abs_logit_diff != 0:
        return Judgement(mergeable=False, why=f"merging changes logits by up to {merged.max_abs_logit_diff:.2g}")
    if merged.sparsity_before != merged.sparsity_after:
        why = f"merging changes the zeros from {merged.sparsity_before:.2%} to {merged.sparsity_after:.2%}"
        return Judgement(mergeable=False, why=why)
    return Judgement(mergeable=True, why="")


def tuned(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a run before merging: its base with its adapter attached."""
    recipe = Recipe.load(folder / RECIPE)
    model, tokenizer = load_base(recipe, load_task(recipe.data))
    load_adapter(model, folder / ADAPTER)
    return model, tokenizer


def last_stage(report: Report) -> str:
    """Return the last stage before merging."""
    return [row.name for row in report.stages if row.name != MERGED][-1]


def has_codes(recipe: Recipe, past: Sequence[str]) -> bool:
    """Return whether the base is quantized after these stages: by the chain, or by an earlier round that it keeps.

    A quantized file that the chain keeps has its codes from the start; a merged model has them under the chain.
    """
    kept = any(isinstance(link, Quantizer) for link in checked_chain(recipe).kept)
    under = len(past) > 1 or grid_of(recipe.chain) is not None
    return (kept and under) or any(name.startswith("quantized") for name in past)


def precision(folder: Path, report: Report, stage: str) -> str:
    """Return the precision of the target layers at a stage and of the adapter: FP32 + FP32, INT4 + FP32, INT4.

    KEEP is that of the quantized model that the link `keep` starts from, whose layers may differ.
    """
    names = [row.name for row in report.stages]
    reached = names[: names.index(stage) + 1]
    recipe = Recipe.load(folder / RECIPE)
    quantizer = checked_chain(recipe).quantizer
    base = _PRECISION[report.environment["dtype"]]
    if quantizer is not None and has_codes(recipe, reached):
        bits = arguments(quantizer).get("bits")
        base = quantizer.name.upper() if bits is None else f"INT{bits}"
    if stage == MERGED or not any(name.startswith("tuned") for name in reached):
        return base
    return f"{base} + {_adapter(folder / ADAPTER)}"


def _adapter(directory: Path) -> str:
    """Return the dtype of the parameters of an adapter, as stored."""
    with safe_open(directory / "adapter.safetensors", framework="pt") as file:
        found = {str(file.get_slice(key).get_dtype()) for key in file.keys() if key.startswith("link/")}  # noqa: SIM118
    return "/".join(sorted(_STORED.get(dtype, dtype) for dtype in found))
