"""Tasks of lm-eval by their names, run by lm-eval itself on a model in memory (the extra `dovetail[eval]`).

Every rule of the task is lm-eval's: prompts, examples, filters and metrics. `dovetail.evaluate` scores other tasks by
the same definitions, without this package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "lm-eval:"
"""What the names of these tasks begin with on the command line."""

Sample = tuple[str, str, str]
"""Prompt, expected answer and the model's answer."""


def evaluate_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, list[Sample]]]:
    """Return the scores of lm-eval's tasks: name -> metric -> score, and the records with the model's answers.

    names       of tasks or groups; a group gives its own row and those of its tasks
    include     a folder of YAML tasks, which are then the only ones: nothing is looked for on the hub
    limit       only the first `limit` records of each task
    shots       examples in the prompt, in place of the task's own number
    max_length  tokens of a row; lm-eval's choice when not given: the model's positions

    lm-eval sets the seeds of all global random generators. Log-likelihoods are computed in float32. A metric with a
    filter is named METRIC, FILTER, as lm-eval does. Raises DataError where lm-eval is not installed, does not know a
    task, or cannot load its data.
    """
    where = "evaluate " + ", ".join(names)
    if importlib.util.find_spec("lm_eval") is None:
        rule = "tasks of lm-eval need the package lm-eval"
        raise DataError(where, found="lm-eval is not installed", rule=rule, fix="pip install 'dovetail[eval]'")
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if include is not None and not Path(include).is_dir():
        rule = "include must be a folder of YAML tasks"
        raise DataError(where, found=f"include={include}", rule=rule, fix="check the path")
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)[:20]) if include is not None else "`lm-eval ls tasks` lists them"
        rule = f"a task must be one of lm-eval's ({known})" if include is None else f"the tasks there are {known}"
        raise DataError(where, found=", ".join(unknown), rule=rule, fix="check the name, or pass --include FOLDER")
    lm: Any = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, softmax_dtype="float32"
    )
    try:
        found: Any = simple_evaluate(
            model=lm, tasks=list(names), task_manager=manager, limit=limit, num_fewshot=shots, bootstrap_iters=0,
            log_samples=True,
        )  # fmt: skip
    except Exception as error:
        # A task runs its own code, and `datasets` raises errors of many kinds, of the connection too.
        lines = str(error).strip().splitlines()
        raise DataError(
            where,
            found=f"{type(error).__name__}: {lines[0] if lines else ''}"[:300],
            rule="the data of the task must be in its folder, in the local cache or on the hub, and its files complete",
            fix="connect once to fill the cache, or write the task as a local YAML file and pass --include FOLDER",
        ) from error
    counts = found["n-samples"]
    scores = {
        name: {
            **{_metric(metric): float(value) for metric, value in values.items() if _is_score(metric, value)},
            **({"n": counts[name]["effective"]} if name in counts else {}),
        }
        for name, values in found["results"].items()
    }
    return scores, {
        # A task with several filters logs each record once for each of them.
        name: [_sample(each) for each in samples if each["filter"] == samples[0]["filter"]]
        for name, samples in found["samples"].items()
    }


def _is_score(metric: str, value: Any) -> bool:
    return "," in metric and "_stderr" not in metric and isinstance(value, int | float)


def _metric(name: str) -> str:
    """Return lm-eval's name of a metric without its filter where that is "none"."""
    metric, _, filtered = name.partition(",")
    return metric if filtered == "none" else f"{metric}, {filtered}"


def _sample(sample: dict[str, Any]) -> Sample:
    """Return the prompt, the expected answer and the answer of a logged sample: the likeliest choice, or the text."""
    first = sample["arguments"]
    calls: list[Any] = list(first.values()) if isinstance(first, dict) else list(first)
    texts = [list(call.values()) if isinstance(call, dict) else list(call) for call in calls]
    prompt, target = str(texts[0][0]), str(sample["target"])
    responses = sample["filtered_resps"]
    if len(texts) > 1 and all(isinstance(each, list | tuple) for each in responses):
        best = max(range(len(responses)), key=lambda at: float(responses[at][0]))
        expected = str(texts[int(target)][1]) if target.isdigit() and int(target) < len(texts) else target
        return prompt, expected, str(texts[best][1])
    return prompt, target, str(sample["resps"][0][0])
