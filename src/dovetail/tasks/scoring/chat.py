"""Conversations: perplexity of the assistant's tokens, or exact match of the last turn.

Perplexity counts every turn of the assistant with its end of turn, after all that precedes it in the conversation. For
exact match, the model continues the conversation after the generation prompt of the chat template, greedily, up to the
end of turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dovetail.errors import DataError
from dovetail.tasks.scoring.generation import continued
from dovetail.tasks.scoring.runner import Runner, Scored
from dovetail.tasks.task import Record
from dovetail.tasks.tokens import last_turn

SAMPLE_TOKENS = 64
"""The most tokens of an answer that is generated as a sample only."""


def score_chat(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return perplexity (inf where exp would overflow) and nats_per_token; exact_match where it is the main metric."""
    sums, counts = runner.log_likelihoods(runner.make.chats(records))
    nats = -(sums.sum() / counts.sum()).item()
    scores: dict[str, float] = {"perplexity": math.exp(nats) if nats < 700 else math.inf, "nats_per_token": nats}
    if runner.metric != "exact_match":
        rules = runner.scoring.model_copy(update={"max_new_tokens": runner.scoring.max_new_tokens or SAMPLE_TOKENS})
        room = max(1, runner.max_length // 2)
        rules = rules.model_copy(update={"max_new_tokens": min(room, rules.max_new_tokens or room)})
        return scores, _answers(replace(runner, scoring=rules), records[: runner.samples], [""])
    expected = [_answer(f"record {index}", record) for index, record in enumerate(records)]
    said = _answers(runner, records, expected)
    right = [runner.scoring.right(text, answer) for text, answer in zip(said, expected, strict=True)]
    return scores | {"exact_match": sum(right) / len(right)}, said


def _answers(runner: Runner, records: Sequence[Record], expected: Sequence[str]) -> list[str]:
    """Return the model's answers in place of the last turns, without the end of turn."""
    if not records:
        return []
    said = continued(runner, expected, lambda room: runner.make.chat_prompts(records, room=room))
    ends = [runner.make.template(record).closing[1].strip() for record in records]
    return [text.strip().removesuffix(end).strip() for text, end in zip(said, ends, strict=True)]


def _answer(where: str, record: Record) -> str:
    content = record["messages"][last_turn(record)].get("content")
    if not isinstance(content, str):
        rule = "exact_match compares texts; the last turn of the assistant must be one"
        raise DataError(where, found="a tool call as the last turn", rule=rule, fix="use the metric perplexity")
    return content
