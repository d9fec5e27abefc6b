"""Reports of studies that nothing was run for: lines with these scores and measures."""

from __future__ import annotations

import math
from typing import Any

from dovetail.studies.comparison import compare
from dovetail.studies.measures import Cell
from dovetail.studies.report import Failure, Result, Spread, StudyReport
from dovetail.studies.summary import summary

Line = tuple[Result, list[Cell]]


def line(
    row: str, scores: list[float | None], *, task: str = "t", failed: tuple[int, ...] = (), diverged: str = "",
    point: dict[str, Any] | None = None, **measures: Any,
) -> Line:  # fmt: skip
    """A line and its cells; a score of None is not finite, and `measures` change all cells."""
    at: dict[str, Any] = {
        "score_base": 0.1, "score_untuned": 0.1, "nbytes_base": 400, "nbytes_untuned": 90, "nbytes": 100,
        "bits_per_weight": 4.5, "nonzero_fraction": 1.0, "bit_reduction": 0.7, "trained_parameters": 8,
        "trained_share": 0.1, "adapter_nbytes": 40, "adapter_nbytes_16_bit": 16, "peak_memory_nbytes": 1000,
        "planned_memory_nbytes": 1000, "steps": 10, "training_seconds": 2.0, "step_seconds": 0.2, "seconds": 3.0,
        "mergeable": True, "merge": "", **measures,
    }  # fmt: skip
    cells = [
        Cell(row=row, point=point or {}, task=task, seed=seed, run=f"{row}-{seed}", stage="tuned", score=score,
             scores={f"{task} accuracy": score}, diverged=diverged if seed == 0 else "", **at)
        for seed, score in enumerate(scores)
    ]  # fmt: skip
    result = Result(
        row=row, point=point or {}, task=task, chain="lora", stage="tuned", sparsity=0.0, mergeable=True, why="",
        precision="FP32", figure=Spread.of([math.inf if score is None else score for score in scores]),
        merged_lossy=None, failed=[Failure(seed=seed, problem="out of\nmemory") for seed in failed], runs=[],
    )  # fmt: skip
    return result, cells


def study_of(
    *lines: Line, metric: str = "accuracy", metrics: dict[str, str] | None = None, **changes: Any
) -> StudyReport:
    """A report of these lines, with three seeds."""
    tasks = list(dict.fromkeys(result.task for result, _ in lines))
    report = StudyReport(
        title="s", task=tasks[0], metric=metric, metrics={task: (metrics or {}).get(task, metric) for task in tasks},
        split="test", model="m", seeds=[0, 1, 2], vary={}, results=[result for result, _ in lines], cost=[], compare=[],
        seconds=0, environment={}, cells=[cell for _, cells in lines for cell in cells],
    )  # fmt: skip
    return report.model_copy(update=changes)


def matrix(**changes: Any) -> StudyReport:
    """Quantizers and adapters on two tasks; the memory grows from point to point, and one run diverged."""
    quantizers = {"none": (0.9, 16.0), "nf4": (0.88, 4.5), "hqq 2": (0.7, 2.5)}
    adapters = {"lora": 0.0, "dora": 0.01, "ia3": -0.1}
    lines = []
    for number, (task, data) in enumerate((("sums", "x"), ("words", "y"))):
        for quantizer, (start, bits) in quantizers.items():
            for at, (adapter, more) in enumerate(adapters.items()):
                scores = [start + more - 0.1 * number + 0.003 * seed * (at + 1) for seed in range(3)]
                lines.append(line(
                    "tuned", [*scores], task=task, point={"quantizer": quantizer, "adapter": adapter, "data": data},
                    nbytes=int(bits * 1e6) + 10_000 * at, bits_per_weight=bits, peak_memory_nbytes=int(1e7 + 1e6 * at),
                    training_seconds=60.0 * (at + 1), diverged="the loss rose" if adapter == "dora" else "",
                ))  # fmt: skip
    results = [result for result, _ in lines]
    vary = {"quantizer": list(quantizers), "adapter": list(adapters), "data": ["x", "y"]}
    report = study_of(*lines, vary=vary, title="Quantizers & <adapters>", **changes)
    report = report.model_copy(update={"compare": compare(results, {"adapter": "lora"})})
    return report.model_copy(update={"summary": summary(report)})
