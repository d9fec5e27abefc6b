"""Generation: the greedy continuation of the prompt, compared with the answer (exact match).

Batched with padding on the left (on the right for an encoder), stopped at the end token or at a stop text of the task
(`dovetail.tasks.rules`). Unless the task says how long it may be, a continuation may run a few tokens past the longest
answer of the task, so an answer with too much text counts as wrong. An extractor compares a part of the answer, such as
the number after "####". Spaces around the answer are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.tasks.rules import Scoring
from dovetail.tasks.scoring.runner import Batch, Runner, Scored, Side
from dovetail.tasks.task import Record
from dovetail.tasks.tokens import Example
from dovetail.tasks.vocabulary import end_ids, wrong_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MORE = 4
"""Tokens that a continuation may have beyond the longest answer."""


def score_generation(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return exact_match: the fraction of records whose greedy continuation is the answer."""
    said = continuations(runner, records)
    right = [runner.scoring.right(text, record["answer"]) for text, record in zip(said, records, strict=True)]
    return {"exact_match": sum(right) / len(right)}, said


class _Watch:
    """A logits processor that changes nothing and remembers whether all logits were finite."""

    def __init__(self) -> None:
        self.bad = False

    def __call__(self, ids_bt: Tensor, logits_bv: Tensor) -> Tensor:
        # The largest: a vocabulary may have masked tokens, at minus infinity.
        self.bad = self.bad or not bool(logits_bv.amax(-1).isfinite().all())
        return logits_bv


class _Stops:
    """A stopping criterion of `generate`: which rows contain a stop text after their prompt of `prompt` tokens."""

    def __init__(self, rules: Scoring, tokenizer: PreTrainedTokenizerBase, prompt: int) -> None:
        self.rules, self.tokenizer, self.prompt = rules, tokenizer, prompt
        self.criteria = [self] if rules.stop else []
        tokens = tokenizer(list(rules.stop), add_special_tokens=False)["input_ids"] if rules.stop else []
        # A stop text may begin and end within tokens, and has more of them where its beginning is another token's end.
        self.width = 2 * max(map(len, tokens), default=0) + 2

    def __call__(self, ids_bt: Tensor, scores_bv: Tensor) -> Tensor:
        ends = ids_bt[:, max(self.prompt, ids_bt.shape[1] - self.width) :]
        texts = self.tokenizer.batch_decode(ends, skip_special_tokens=True)
        found = [any(stop in text for stop in self.rules.stop) for text in texts]
        return torch.tensor(found, device=ids_bt.device)


def continuations(runner: Runner, records: Sequence[Record]) -> list[str]:
    """Return the greedy continuation of each record's prompt up to the end token, without special tokens."""
    prompts = [record["prompt"] for record in records]
    return continued(
        runner, [record["answer"] for record in records], lambda room: runner.make.prompts(prompts, room=room)
    )


def continued(runner: Runner, answers: Sequence[str], rows_of: Callable[[int], list[Example]]) -> list[str]:
    """Return the greedy continuations of rows up to the end token or a stop text, without special tokens.

    answers   what is expected; unless the task says how long an answer may be, a continuation has a few tokens more
              than the longest of them, at most
    rows_of   number of tokens to keep free for a continuation -> the rows
    """
    from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

    model, tokenizer = runner.model, runner.tokenizer
    if not (isinstance(model, GenerationMixin) and isinstance(model, PreTrainedModel) and model.can_generate()):
        raise wrong_model(runner.name, model)
    lengths = map(len, tokenizer(list(answers), add_special_tokens=False)["input_ids"])
    new_tokens = runner.scoring.max_new_tokens or max(lengths) + MORE
    room = runner.max_length if runner.encoder_decoder else runner.max_length - new_tokens
    if room < 1:
        found, rule = f"an answer of {new_tokens} tokens", "prompt and answer must fit in max_length tokens"
        raise DataError(f"task {runner.name}", found=found, rule=rule, fix=f"raise max_length={runner.max_length}")
    rows = rows_of(runner.max_length - room)
    generate: Callable[..., Any] = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    own = model.generation_config
    # The model's own settings (sampling, penalties) are put aside: generate() would mix them into ours.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        use_cache=True,
        pad_token_id=runner.pad_id,
        eos_token_id=end_ids(model, tokenizer, runner.make.turn_ends) or None,
        decoder_start_token_id=own.decoder_start_token_id,
        bos_token_id=own.bos_token_id,
    )
    said = [""] * len(rows)
    side: Side = "right" if runner.encoder_decoder else "left"  # an encoder reads from its first position

    def first_logits(batch: Batch) -> Tensor:
        """Return the logits (b, 2, v) of the first two tokens, without an end."""
        found: Any = generate(
            **batch, max_new_tokens=2, eos_token_id=None, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(found.logits, dim=1)

    try:
        for chosen, batch in runner.batches(rows, side, first_logits):
            watch = _Watch()
            stops = _Stops(runner.scoring, tokenizer, 0 if runner.encoder_decoder else batch["input_ids"].shape[1])
            tokens_bt = generate(**batch, logits_processor=[watch], stopping_criteria=stops.criteria)
            if watch.bad:
                raise runner.not_finite(lambda batch=batch: generate(**batch))
            if not runner.encoder_decoder:
                tokens_bt = tokens_bt[:, batch["input_ids"].shape[1] :]
            for row, text in zip(chosen, tokenizer.batch_decode(tokens_bt, skip_special_tokens=True), strict=True):
                said[row] = runner.scoring.stopped(text)
    finally:
        model.generation_config = own
    return runner.joined(said)
