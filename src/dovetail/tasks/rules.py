"""How the records of a task are scored: examples in the prompt, where an answer ends, and what of it counts."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

MARKED, LAST_NUMBER = "####", "last_number"
"""Extractors by name; any other text is a regular expression."""
_PATTERNS = {MARKED: (r"#### (\-?[0-9\.\,]+)", 0), LAST_NUMBER: (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
"""Extractor -> its pattern and which match counts: the filters strict-match and flexible-extract of lm-eval's gsm8k."""

Count = Annotated[int, Field(ge=1, strict=True)]


class Scoring(pydantic.BaseModel, extra="forbid", frozen=True):
    r"""Settings of the scores of a task; each has an effect on the kinds that it names only.

    shots            generation, choice: answered records that precede the prompt, as many as this
    shots_split      the split whose first records they are; a record that is scored is not an example of itself
    shot_separator   between them
    description      generation, choice: a text before them
    normalize        choice: what accuracy_norm divides the log-likelihood of a choice by: characters (lm-eval's
                     acc_norm), bytes (its acc_bytes) or tokens (the mean log-likelihood of a token)
    stop             generation, chat: texts at which an answer ends; they do not belong to it
    max_new_tokens   generation, chat: of an answer; a few more than the longest expected answer has when not given
    extract          generation, chat: what of an answer is compared: the number after "####", the "last_number", or the
                     first match of a regular expression, of which the first group that is not empty. The expected
                     answer is treated in the same way, or taken whole where nothing matches. Numbers are compared
                     without thousands separators, dollar signs and a full stop at the end
    ignore_case      generation, chat: compare in lower case
    stride           text: tokens by which the window moves on, so that each token after the first window has at least
                     `max_length - stride` tokens of context; disjoint windows when not given

    >>> Scoring(extract="####").extracted("so 3 * 6 = 18\n#### 1,018.")
    '1018'
    """

    shots: Annotated[int, Field(ge=0, strict=True)] = 0
    shots_split: str = "train"
    shot_separator: str = "\n\n"
    description: str = ""
    normalize: Literal["characters", "bytes", "tokens"] = "characters"
    stop: tuple[str, ...] = ()
    max_new_tokens: Count | None = None
    extract: str | None = None
    ignore_case: Annotated[bool, Field(strict=True)] = False
    stride: Count | None = None

    @pydantic.field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _legal(self) -> Scoring:
        if "" in self.stop:
            raise ValueError("a stop text must have at least one character")
        if self.extract is not None and self.extract not in _PATTERNS:
            try:
                re.compile(self.extract)
            except re.error as error:
                raise ValueError(f"extract must be {MARKED}, {LAST_NUMBER} or a regular expression: {error}") from None
        return self

    def stopped(self, text: str) -> str:
        """Return an answer up to its first stop text."""
        for stop in self.stop:
            text = text.split(stop, 1)[0]
        return text

    def extracted(self, text: str) -> str | None:
        """Return what of a text is compared; None where the extractor finds nothing."""
        found = text
        if self.extract is not None:
            pattern, which = _PATTERNS.get(self.extract, (self.extract, 0))
            matches = list(re.finditer(pattern, text))
            if not matches:
                return None
            match = matches[which]
            found = str(next((group for group in match.groups() if group), match[0]))
            if self.extract in _PATTERNS:
                found = re.sub(r"\.$", "", found.strip().replace(",", "").replace("$", ""))
        found = found.strip()
        return found.lower() if self.ignore_case else found

    def right(self, said: str, expected: str) -> bool:
        """Return whether an answer is the expected one."""
        wanted = self.extracted(expected)
        if wanted is None:
            wanted = expected.strip().lower() if self.ignore_case else expected.strip()
        return self.extracted(said) == wanted
