r"""Conversations as text: the chat template of the tokenizer, or a named one, and where the assistant's turns are.

Everything is rendered by `apply_chat_template`, so that a row holds the tokens that any other program makes of the
same messages. A named template is a Jinja template too; training with it stores it in the tokenizer.

What is learned are the assistant's turns with their end of turn. A conversation is rendered once, as a whole. The turn
of message i begins where the messages before it, rendered with the generation prompt, end; it ends where the messages
up to it end, without what follows the end of turn (white space, and the end of the text that some templates add). Both
renderings must be beginnings of the whole. A template that changes earlier turns (Qwen3 leaves out their reasoning)
still passes if the turn is the text of the message and the end of turn. Otherwise the `{% generation %}` tags of the
template decide, and a template without them is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from dovetail.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Begin and end in the characters of a text."""
Turns = tuple[str, list[Span], list[Span]]
"""The text of a conversation, the turns that are trained, and the parts of them that are not."""

_WRITE = "Write a response that appropriately completes the request."
_TASK = "Below is an instruction that describes a task"
_CONTEXT = "paired with an input that provides further context"
_ALPACA = (
    "{% set first = messages[0] %}"
    "{% if first.role == 'system' %}{{ first.content }}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}"
    f"{{{{ '{_TASK}, {_CONTEXT}. {_WRITE}' if first.input else '{_TASK}. {_WRITE}' }}}}{{% endif %}}"
    "{% for message in turns %}{% if message.role == 'user' %}"
    r"{{ '\n\n### Instruction:\n' + (message.instruction or message.content) }}"
    r"{% if message.input %}{{ '\n\n### Input:\n' + message.input }}{% endif %}"
    r"{% elif message.role == 'assistant' %}{{ '\n\n### Response:\n' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('the template alpaca renders no turn of the role ' + message.role) }}{% endif %}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
)
_CHATML = (
    r"{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PLAIN = (
    r"{% for message in messages %}"
    r"{{ message.content + (eos_token if message.role == 'assistant' else '\n') }}{% endfor %}"
)
TEMPLATES: Mapping[str, str] = {"alpaca": _ALPACA, "chatml": _CHATML, "plain": _PLAIN}
"""Named templates. alpaca: Stanford Alpaca's prompts; chatml: `<|im_start|>role ... <|im_end|>`; plain: the texts only,
each on its own line, and the end token after the assistant's."""

SEGMENTS = "segments"
"""What a record of the format segments has in the place of a template."""

DEFAULT = "alpaca"
"""The template of a tokenizer that has none."""
_PROBE = "an answer of the assistant 0123"


class Template:
    """A chat template and the tokenizer that renders it.

    name    one of TEMPLATES; None: the tokenizer's own, or DEFAULT where it has none
    begin   the special tokens that the tokenizer puts before a text; a named template begins with them
    source  the Jinja text of a named template; None for the tokenizer's own
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str | None, begin: str) -> None:
        self.tokenizer = tokenizer
        if name is None and not tokenizer.chat_template:
            name = DEFAULT
        if name is not None and name not in TEMPLATES:
            rule = "a named template must be one of " + ", ".join(TEMPLATES)
            raise DataError("template", found=f"template {name!r}", rule=rule, fix="name one of these templates")
        self.name = "the tokenizer's chat template" if name is None else f"the template {name}"
        self.source = None if name is None else f"{{{{ {json.dumps(begin)} }}}}{TEMPLATES[name]}"
        if name is not None and self.end_id is None:
            raise DataError(
                self.name,
                found=f"the end of turn {self.closing[1]!r}, which is not one token of the tokenizer",
                rule="a named template must end a turn with a token at which generation stops",
                fix="add the token to the tokenizer and the model, or name another template: " + ", ".join(TEMPLATES),
            )

    def render(self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool) -> str:
        """Return the text of messages, with the generation prompt after them if `prompt`."""
        from jinja2 import TemplateError

        errors = (TemplateError, TypeError, ValueError, KeyError)
        try:
            return self._applied(messages, tools, prompt)
        except errors as error:
            written = _with_written_arguments(messages)
            if written == messages:
                raise self._refused(where, str(error)[:200]) from None
        try:
            return self._applied(written, tools, prompt)  # DeepSeek's templates take arguments as OpenAI writes them
        except errors as error:
            raise self._refused(where, str(error)[:200]) from None

    def _applied(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool) -> str:
        text: Any = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            chat_template=self.source,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        return text

    def _refused(self, where: str, found: str) -> DataError:
        names = ", ".join(TEMPLATES)
        return DataError(
            where,
            found=found,
            rule=f"{self.name} must render the messages, and each turn of the assistant must be found in the text",
            fix=f"change the record, or name a template: {names} (data.template of a recipe)",
        )

    @cached_property
    def closing(self) -> tuple[str, str]:
        """What follows the text of the last turn, and the part of it that ends the turn."""
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _PROBE}]
        text = self.render("a conversation of two turns", messages, None, prompt=False)
        at = text.rfind(_PROBE)
        after = text[at + len(_PROBE) :]
        tokens = [token for token in self._tokens if after.lstrip().startswith(token)]
        white = len(after) - len(after.lstrip())
        end = after[: white + len(max(tokens, key=len))] if tokens else after.rstrip()
        if at < 0 or not end:
            rule = f"{self.name} must render the assistant's text and end its turn"
            fix = "name a template: " + ", ".join(TEMPLATES)
            raise DataError("a conversation of two turns", found=f"{text[-200:]!r}", rule=rule, fix=fix)
        return after, end

    @cached_property
    def _tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values()]

    @property
    def end_id(self) -> int | None:
        """The token that ends a turn; None where several tokens do."""
        end = self.closing[1].strip()
        found: Any = self.tokenizer.convert_tokens_to_ids(end) if end in self._tokens else None
        return found

    def turns(self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> Turns:
        """Return the text of a conversation, the assistant's turns that are trained, and what in them is not."""
        whole = self.render(where, messages, tools, prompt=False)
        self._check_whole(where, whole, messages, tools)
        wanted = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._span(where, whole, messages, tools, at) for at in wanted]
        if None in spans:
            spans = self._tagged(where, whole, messages, tools, len(wanted))
        trained: list[Span] = []
        untrained: list[Span] = []
        for at, span in zip(wanted, spans, strict=True):
            assert span is not None
            self._check_calls(where, messages[at], whole[slice(*span)])
            parts = messages[at].get("train", True)
            if parts:
                trained.append(span)
            if isinstance(parts, list):
                untrained += self._untrained(where, whole, span, messages[at])
        return whole, trained, untrained

    def _untrained(self, where: str, whole: str, turn: Span, message: Message) -> list[Span]:
        """Return the characters of a turn's content that are not trained, as places in the text."""
        content = str(message.get("content") or "")
        shift = len(content) - len(content.lstrip())  # which some templates leave out
        begin = whole.rfind(content.strip(), *turn) - shift
        if begin + shift < turn[0]:
            raise self._refused(where, "a turn that is trained in parts, whose content the template changes")
        ends = [0, *(begin_or_end for part in message["train"] for begin_or_end in part), len(content)]
        spans = zip(ends[::2], ends[1::2], strict=True)
        return [(max(begin + first, turn[0]), begin + last) for first, last in spans if last > first]

    def _span(
        self, where: str, whole: str, messages: Sequence[Message], tools: Sequence[Any] | None, at: int
    ) -> Span | None:
        """Return where the turn of message `at` is; None where the template changes what precedes it."""
        if at == 0:
            raise self._refused(where, "a conversation that begins with a turn of the assistant")
        before = self.render(where, messages[:at], tools, prompt=True)
        if not whole.startswith(before):
            return None
        last = at == len(messages) - 1
        upto = whole if last else self.render(where, messages[: at + 1], tools, prompt=False)
        after, end = self.closing
        upto = upto[: len(upto) - len(after)] + end if upto.endswith(after) else upto.rstrip()
        if not whole.startswith(upto) or len(upto) <= len(before):
            upto = before + str(messages[at].get("content") or "").strip() + end
        return (len(before), len(upto)) if whole.startswith(upto) else None

    def _tagged(
        self, where: str, whole: str, messages: Sequence[Message], tools: Sequence[Any] | None, number: int
    ) -> list[Span | None]:
        """Return the turns as the template's generation tags mark them, with the end of turn."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source: Any = self.tokenizer.get_chat_template(self.source, tools=None if tools is None else list(tools))
        if re.search(r"\{%-?\s*generation\s*-?%\}", source) is None:
            raise self._refused(where, "a turn whose text depends on the turns after it")
        special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=None if tools is None else list(tools),
            chat_template=source,
            return_assistant_tokens_mask=True,
            **special,
        )
        (text,), (marks,) = rendered
        end = self.closing[1]
        if text != whole or len(marks) != number:
            raise self._refused(where, f"{number} turns of the assistant, of which {len(marks)} are tagged")
        return [(start, stop + len(end) if whole.startswith(end, stop) else stop) for start, stop in marks]

    def _check_whole(self, where: str, whole: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Raise DataError for tools, a system prompt or a text of the user that the template leaves out."""
        for tool in tools or ():
            name = (tool.get("function") or tool).get("name") if isinstance(tool, Mapping) else None
            if not name or str(name) not in whole:
                raise self._refused(where, f"a tool that is not in the text: {str(tool)[:100]}")
        for message in messages:
            role = message["role"]
            # A message of the format alpaca may be rendered in parts.
            texts = [message[key] for key in ("instruction", "input") if key in message] or [message.get("content")]
            for text in texts if role in ("system", "developer", "user") else []:
                if isinstance(text, str) and text.strip() not in whole:
                    raise self._refused(where, f"a text of the role {role} that is not in the text: {text[:100]!r}")

    def _check_calls(self, where: str, message: Message, turn: str) -> None:
        """Raise DataError for a tool call that the template leaves out."""
        for call in message.get("tool_calls") or ():
            name = call.get("function", call).get("name")
            if str(name) not in turn:
                raise self._refused(where, f"a call of the tool {name!r} that is not in the text of its turn")


def _with_written_arguments(messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages whose calls of tools have their arguments as JSON."""

    def written(call: Any) -> Any:
        inner = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("arguments"), Mapping):
            return call
        return {**call, "function": {**inner, "arguments": json.dumps(inner["arguments"], ensure_ascii=False)}}

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


class Segments:
    """What stands in the place of a template for texts that are joined as they are (axolotl's `input_output`).

    The file writes every special token itself, also those at the beginning and at the ends of turns.
    """

    source = None
    end_id = None
    closing = ("", "")

    def render(self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool) -> str:
        """Return the texts in a row."""
        return "".join(message["content"] for message in messages)

    def turns(self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> Turns:
        """Return the texts in a row, and the spans of those that are trained."""
        ends = list(accumulate(len(message["content"]) for message in messages))
        spans = zip([0, *ends], ends, messages, strict=False)
        trained = [(start, end) for start, end, message in spans if message["role"] == "assistant"]
        return self.render(where, messages, tools, prompt=False), trained, []


def mark_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Return for each token whether it lies in one of the spans, in whole or in part: (tokens,) bool.

    offsets   begin and end of each token in the text, as a tokenizer returns them. Some leave white space out at the
              beginning of a token, and the tokens of one character share its offsets, so a token reaches from the end
              of the token before, or from its own beginning where that is earlier
    """
    import numpy as np  # which `dovetail --help` need not wait for

    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    begins, ends = flat[::2], flat[1::2]
    before = np.maximum.accumulate(np.concatenate([[0], ends])[:-1])
    first = np.minimum(begins, before)
    marks = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        marks |= np.maximum(first, start) < np.minimum(ends, stop)
    return marks
