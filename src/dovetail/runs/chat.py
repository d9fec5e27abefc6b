"""Talking to a model: turns of a conversation by its chat template, or plain continuations where it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dovetail.errors import DovetailError
from dovetail.tasks.finite import check_finite
from dovetail.tasks.holding import holding
from dovetail.tasks.lengths import in_evaluation, length_limit
from dovetail.tasks.tokens import Example, RowMaker
from dovetail.tasks.vocabulary import end_ids, pad_id, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KEPT = ("top_k", "top_p", "min_p", "repetition_penalty")
"""Settings of sampling that the model's generation_config.json may name, and that are followed."""


class Chat:
    """A conversation with a language model, on the device where the model is.

    model, tokenizer  of a causal or an encoder-decoder language model; it may carry a chain or be packed
    system            the system prompt; needs a chat template
    max_new_tokens    of an answer
    temperature       of sampling; 0 always takes the most likely token
    seed              of sampling: the same turns have the same answers

    templated   whether the tokenizer has a chat template. Without one, each text is continued alone: nothing is put
                around it, and no turn knows the turns before
    forgotten   number of the oldest messages that no longer fit in the context
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        if not model.can_generate():
            rule, fix = "the model must be a language model", "score a model with a head with dovetail evaluate"
            raise DovetailError("chat", found=f"a {type(model).__name__}, which writes no text", rule=rule, fix=fix)
        for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("temperature", temperature, 0)):
            if not least <= value < 1e9:
                rule = f"{name} must be at least {least} and finite"
                raise DovetailError("chat", found=f"{name}={value}", rule=rule, fix=f"change {name}")
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.seed = temperature, seed
        self.templated = bool(tokenizer.chat_template) and not model.config.is_encoder_decoder
        if system is not None and not self.templated:
            rule = "a system prompt needs a chat template, which the tokenizer does not have"
            raise DovetailError("chat", found="a system prompt", rule=rule, fix="put it at the beginning of the text")
        self.forgotten = 0
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []
        length = length_limit(model, tokenizer, 1 << 20, [])
        self.max_new_tokens = min(max_new_tokens, max(1, length // 2))
        self._make = RowMaker(tokenizer, bool(model.config.is_encoder_decoder), length, vocabulary_of(model))
        self._answers = 0

    def say(self, text: str, on_text: Callable[[str], object] = lambda text: None) -> str:
        """Return the model's answer to a text; `on_text` is called with each part of it as it is generated.

        An exception that leaves the call, such as KeyboardInterrupt, leaves the conversation as it was.
        """
        from transformers import GenerationConfig

        asked = {"role": "user", "content": text}
        row = self._row(asked) if self.templated else self._make.prompts([text], room=self.max_new_tokens)[0]
        ids = torch.tensor([row["input_ids"]], device=self.model.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._answers == 0 and not self.model.config.is_encoder_decoder:
            with torch.inference_mode(), in_evaluation(self.model):
                check_finite("chat", self.model, lambda: self.model(**batch, use_cache=False))
        own = self.model.generation_config
        drawn: dict[str, Any] = {name: getattr(own, name, None) for name in _KEPT}
        drawn = {name: value for name, value in drawn.items() if value is not None}
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            use_cache=True,
            pad_token_id=pad_id(self.tokenizer, self._make.vocabulary),
            eos_token_id=end_ids(self.model, self.tokenizer, self._make.turn_ends) or None,
            decoder_start_token_id=own.decoder_start_token_id,
            bos_token_id=own.bos_token_id,
            do_sample=self.temperature > 0,
            **({"temperature": self.temperature, **drawn} if self.temperature > 0 else {}),
        )
        stream = _Stream(self.tokenizer, on_text)
        generate: Any = self.model.generate
        self.model.generation_config = config  # generate() would mix the model's own settings into ours
        try:
            with torch.inference_mode(), in_evaluation(self.model), holding(self.model), torch.random.fork_rng():
                torch.manual_seed(self.seed + self._answers)
                generate(**batch, streamer=stream)
        finally:
            self.model.generation_config = own
        self._answers += 1
        if self.templated:
            self._turns += [asked, {"role": "assistant", "content": stream.text}]
        return stream.text

    def _row(self, asked: dict[str, str]) -> Example:
        """Return the row of the conversation; its oldest messages are left out until the rest fits."""
        while True:
            messages = [*self._system, *self._turns, asked, {"role": "assistant", "content": ""}]
            self._make.cut = 0
            row = self._make.chat_prompts([{"messages": messages}], room=self.max_new_tokens)[0]
            if not self._make.cut or not self._turns:
                return row
            self._turns = self._turns[2:]
            self.forgotten += 2


class _Stream:
    """A streamer for `generate`: passes on text that later tokens cannot change, whole words at a time.

    The parts joined are exactly the decoded answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]) -> None:
        self.text = ""
        self._tokenizer, self._on_text = tokenizer, on_text
        self._tokens: list[int] = []
        self._begun = False
        self._shown = 0

    def put(self, value: Any) -> None:
        """Take the prompt at the first call, and a token at each further one."""
        if not self._begun:
            self._begun = True
            return
        self._tokens += value.flatten().tolist()
        self.text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        # The last word may change with its next token, and half a character is decoded as U+FFFD.
        end = max(self.text.rfind(" "), self.text.rfind("\n") + 1)
        self._show(end if "\ufffd" not in self.text[self._shown : end] else self._shown)

    def end(self) -> None:
        """Pass on the rest."""
        self._show(len(self.text))

    def _show(self, end: int) -> None:
        if end > self._shown:
            self._on_text(self.text[self._shown : end])
            self._shown = end
