"""Answered examples before the prompt, as lm-eval's sampler `first_n` puts them there."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.errors import DataError
from dovetail.tasks.task import Record, Task

KINDS = ("generation", "choice")


def with_shots(task: Task, split: str, limit: int | None) -> Sequence[Record]:
    """Return the records of a split with the task's description and examples before their prompts.

    Raises DataError for a task without prompts, and for fewer examples than the task asks for.
    """
    rules, records = task.scoring, task.split(split)[:limit]
    if not rules.shots and not rules.description:
        return records
    where = f"task {task.name}"
    if task.kind not in KINDS:
        rule = "shots and a description need records with a prompt: " + ", ".join(KINDS)
        raise DataError(where, found=f"a {task.kind} task", rule=rule, fix="remove shots and description")
    pool: Sequence[Record] = task.split(rules.shots_split)[: rules.shots + 1] if rules.shots else ()
    found = []
    for record in records:
        shots = [shot for shot in pool if shot != record][: rules.shots]
        if len(shots) < rules.shots:
            rule, fix = f"the split {rules.shots_split} must have as many records", "lower shots, or name another split"
            raise DataError(where, found=f"{len(shots)} examples for {rules.shots} shots", rule=rule, fix=fix)
        before = "".join(f"{shot['prompt']}{_answer(shot)}{rules.shot_separator}" for shot in shots)
        found.append({**record, "prompt": f"{rules.description}{before}{record['prompt']}"})
    return found


def _answer(record: Record) -> str:
    return record["choices"][record["label"]] if "choices" in record else record["answer"]
