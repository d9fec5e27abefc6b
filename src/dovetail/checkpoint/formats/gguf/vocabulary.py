"""A tokenizer as the keys of a GGUF file, or a refusal where llama.cpp would cut a text into other tokens.

llama.cpp has three tokenizers that matter here:

- "gpt2", byte-level BPE. A text is cut by regular expressions first, which llama.cpp has in its code under a name
  ("tokenizer.ggml.pre"); its own converter finds the name by the hash of a text's tokens. Here the steps of the
  pre-tokenizer themselves are compared, so that it is found for every vocabulary.
- "llama", SentencePiece's pieces. Of all neighbours whose joined text is a token, those of the highest score are joined
  first. A tokenizer of the tokenizers library has a list of merges in place of scores. Both give the same tokens where
  the merges that make one token follow each other in the list, and every way to join two tokens into a third is listed;
  the score is then minus the place in the list. This holds for what was converted from SentencePiece, and is checked.

- "t5", Unigram: of all ways to cut a text, the one with the largest sum of scores. The tokenizers library searches in
  the same order, with the same score for a character that is no token. It often cuts each word for itself, where
  llama.cpp cuts the whole text: no token may then go beyond a word. llama.cpp has no bytes for unknown characters here.

Source: llama.cpp's `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.checkpoint.formats.gguf.families import LIKE
from dovetail.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens: NORMAL ones are merged, USER_DEFINED are matched first, CONTROL not in plain text."""
_SPACE = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED_REST = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = rf"{_CONTRACTIONS}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}|{_MARKED_REST}"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_REST}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASH_REST}"
)
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}
"""Regular expressions that cut a text, one after the other, and whether words that are tokens are not merged -> the
name of a pre-tokenizer of llama.cpp that does so. Several names mean the same."""

_NO_MARKS = ("tekken", "gpt-4o")
"""Pre-tokenizers whose expressions in llama.cpp take a combining mark for no part of a word."""


@dataclass(frozen=True)
class Vocabulary:
    """The keys "tokenizer.…" of a file.

    model     "gpt2", "llama" or "t5"
    pre       name of the pre-tokenizer
    tokens    texts by id, as many as the embedding has rows
    types     llama.cpp's type of each
    scores    of each; None for "gpt2"
    merges    pairs, parted by a space; None for "llama" and "t5"
    prefix    whether a space is put before a text; None: never
    collapse  whether spaces that follow each other are one, and those at the end none; None: never
    charsmap  SentencePiece's table of characters that are replaced; None: without one
    special   "bos", "eos", "unk", "pad" or "mask" -> id
    adds      "bos" and "eos" -> whether texts get the token
    template  of chats
    notes     where llama.cpp takes other tokens than the tokenizer
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    prefix: bool | None
    collapse: bool | None
    charsmap: bytes | None
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    template: str | None
    notes: list[str]

    def write(self, writer: GGUFWriter) -> None:
        """Write the keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.prefix is not None:
            writer.add_add_space_prefix(self.prefix)
        if self.collapse is not None:
            writer.add_remove_extra_whitespaces(self.collapse)
        if self.charsmap is not None:
            writer.add_precompiled_charsmap(self.charsmap)
        ids = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id}
        ids |= {"pad": writer.add_pad_token_id, "mask": writer.add_mask_token_id}
        for name, number in self.special.items():
            ids[name](number)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase | None, rows: int) -> Vocabulary:
    """Return a tokenizer as the keys of a file.

    rows    of the embedding: tokens beyond are left out, and rows without a token get one that no text has
    errors  ExportError for a tokenizer that llama.cpp does not have
    """
    from transformers import PreTrainedTokenizerFast

    if tokenizer is None:
        found = "no GGUF file to be like, and no tokenizer"
        raise _refused(found, "a GGUF file holds the tokenizer of its model", "pass tokenizer=, or --like FILE (like=)")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refused(type(tokenizer).__name__, "the tokenizer must be one of the tokenizers library")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] == "Unigram":
        return _unigram(tokenizer, rules, rows)
    if model["type"] != "BPE":
        raise _refused(f"a model of type {model['type']}", "llama.cpp's tokenizers here are BPE and SentencePiece's")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"BPE with {key}={str(model[key])[:60]}", f"llama.cpp has no {key}")
    added = {each["id"]: each for each in rules["added_tokens"]}
    merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    steps = _flat(rules["pre_tokenizer"], "pretokenizers")
    if steps and steps[-1]["type"] == "ByteLevel":
        pre, prefix, scores = _byte_level(rules["normalizer"], steps, bool(model.get("ignore_merges"))), None, None
    else:
        prefix = _prefix(_flat(rules["normalizer"], "normalizers"), steps, model)
        pre, scores = "default", _scores(model["vocab"], merges, {each["content"] for each in added.values()})
    texts = {number: token for token, number in model["vocab"].items()}
    texts |= {number: each["content"] for number, each in added.items()}
    unknown = None if scores is None else model["vocab"].get(model["unk_token"])
    bytes_ = {at for at, token in texts.items() if scores is not None and _is_byte(token)}
    tokens, types = _table(texts, added, rows, unknown, bytes_)
    special = _special(tokenizer, rows)
    return Vocabulary(
        model="gpt2" if scores is None else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=None if scores is None else [scores.get(token, 0.0) for token in tokens],
        merges=[" ".join(pair) for pair in merges] if scores is None else None,
        prefix=prefix,
        collapse=None,
        charsmap=None,
        special=special,
        adds=_adds(tokenizer, special),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        notes=_notes(pre, rules["normalizer"], sum(number >= rows for number in texts)),
    )


def _notes(pre: str, normalizer: dict[str, Any] | None, dropped: int) -> list[str]:
    found = [f"{dropped:,} tokens are left out, for which the embedding has no row"] if dropped else []
    if pre in _NO_MARKS:
        found.append(f"llama.cpp cuts words with combining marks otherwise in {pre} (Hindi, Khmer)")
    if normalizer is not None and normalizer["type"] == "NFC":
        found.append("llama.cpp does not normalize texts to NFC")
    return found


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer in order."""
    if step is None:
        return []
    return [each for part in step[key] for each in _flat(part, key)] if step["type"] == "Sequence" else [step]


def _byte_level(normalizer: dict[str, Any] | None, steps: Sequence[dict[str, Any]], ignore_merges: bool) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer."""
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp normalizes no text
        raise _refused(f"the normalizer {normalizer['type']}", "byte-level BPE must have no normalizer, or NFC")
    found = []
    for step in steps:
        if step["type"] == "ByteLevel" and step is steps[-1] and not step["add_prefix_space"]:
            found += [_GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append(_DIGIT)
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
            found.append(step["pattern"].get("Regex", ""))
        else:
            raise _refused(f"the pre-tokenizer {json.dumps(step)[:200]}", _RULE)
    if (name := PRE_TOKENIZERS.get((tuple(found), ignore_merges))) is None:
        shown = f"the pre-tokenizer {' and '.join(found)[:200]}, ignore_merges={ignore_merges}"
        raise _refused(shown, _RULE)
    return name


_RULE = f"a byte-level pre-tokenizer must be llama.cpp's {', '.join(PRE_TOKENIZERS.values())}"


def _prefix(normalizers: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], model: dict[str, Any]) -> bool:
    """Return whether a tokenizer of pieces puts a space before a text. Raises ExportError for one that is not."""
    found = []
    for each in normalizers:
        if each["type"] == "Prepend" and each["prepend"] == _SPACE:
            found.append("prepend")
        elif each["type"] == "Replace" and (each["pattern"], each["content"]) == ({"String": " "}, _SPACE):
            found.append("replace")
        else:
            raise _refused(f"the normalizer {json.dumps(each)[:200]}", _PIECES)
    for each in steps:
        if each["type"] == "Metaspace" and each["replacement"] == _SPACE and not each["split"]:
            found += ["replace", *(["prepend"] if each["prepend_scheme"] != "never" else [])]
        elif each["type"] != "Split" or each["pattern"] != {"String": " "} or "replace" not in found:
            raise _refused(f"the pre-tokenizer {json.dumps(each)[:200]}", _PIECES)
    if "replace" not in found or not model.get("byte_fallback") or model.get("ignore_merges"):
        raise _refused(f"BPE with byte_fallback={model.get('byte_fallback')}", _PIECES)
    return "prepend" in found


_PIECES = f"SentencePiece's BPE falls back to bytes, and only writes spaces as {_SPACE}; other BPE must be byte-level"


def _scores(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]], added: set[str]) -> dict[str, float]:
    """Return token -> score. Raises ExportError where scores give other tokens than the merges."""
    scores: dict[str, float] = {}
    last = ""
    for first, second in merges:
        joined = first + second
        if joined != last and joined in scores:
            raise _refused(f"merges of {joined[:60]!r} apart from each other", _MERGES)
        scores.setdefault(joined, -float(len(scores)))
        last = joined
    apart = [token for token in vocabulary if token in scores or not (token in added or _is_byte(token))]
    ways = sum(token[:at] in vocabulary and token[at:] in vocabulary for token in apart for at in range(1, len(token)))
    if ways != len(set(merges)):
        found = f"{len(merges):,} merges for the {ways:,} ways to join two tokens into a third"
        raise _refused(found, _MERGES)
    return scores


_MERGES = (
    "llama.cpp joins the tokens whose text is a token of the highest score: the merges must be all of them, in order"
)


def _unigram(tokenizer: PreTrainedTokenizerFast, rules: dict[str, Any], rows: int) -> Vocabulary:
    """Return a Unigram tokenizer as the keys of a file. Raises ExportError for one that llama.cpp does not have."""
    model, added = rules["model"], {each["id"]: each for each in rules["added_tokens"]}
    pieces: list[tuple[str, float]] = [(token, score) for token, score in model["vocab"]]
    unknown, normalizers = model["unk_id"], _flat(rules["normalizer"], "normalizers")
    if model.get("byte_fallback") or unknown is None or unknown >= min(rows, len(pieces)):
        found = f"Unigram with byte_fallback={model.get('byte_fallback')}, unk_id={unknown}"
        raise _refused(found, "llama.cpp's Unigram has one token for all unknown characters, and no bytes")
    charsmap = None
    if normalizers and normalizers[0]["type"] == "Precompiled":
        charsmap = b64decode(normalizers[0]["precompiled_charsmap"])
        normalizers = normalizers[1:]
    collapse = bool(normalizers)
    said = {(each["type"], each.get("strip_right"), str(each.get("pattern"))) for each in normalizers}
    spaces = all(each.get("content", " ") in (" ", _SPACE) for each in normalizers)
    if normalizers and (said != _ONE_SPACE or not spaces):
        rule = "Unigram may replace characters by SentencePiece's table, then strip the end and make spaces one"
        raise _refused(f"the normalizer {json.dumps(normalizers)[:200]}", rule)
    steps = _flat(rules["pre_tokenizer"], "pretokenizers")
    if len(steps) != 1 or steps[0]["type"] != "Metaspace" or steps[0]["replacement"] != _SPACE:
        raise _refused(f"the pre-tokenizer {json.dumps(steps)[:200]}", "the pre-tokenizer of Unigram must be Metaspace")
    scheme, split = steps[0]["prepend_scheme"], steps[0]["split"]
    if scheme == "first" or (collapse and scheme != "always"):
        found = f"Metaspace with prepend_scheme={scheme}" + (", where spaces are made one" if collapse else "")
        raise _refused(found, "llama.cpp puts a space before the text after each special token, or never")
    normal = [score for at, (_, score) in enumerate(pieces) if at not in added and at != unknown]
    inner = [token for at, (token, _) in enumerate(pieces) if at not in added and _SPACE in token[1:]]
    if (split and inner) or _SPACE not in dict(pieces):
        found = f"the token {inner[0][:60]!r}" if split and inner else f"no token {_SPACE}"
        raise _refused(found, f"{_SPACE} must be a token, and where texts are cut at it only begin other tokens")
    if not normal or min(normal) != min(score for _, score in pieces):
        rule = "unknown characters are scored by the lowest score of a token that is not special"
        raise _refused("a special token of the lowest score", rule)
    texts = {at: token for at, (token, _) in enumerate(pieces)} | {at: each["content"] for at, each in added.items()}
    tokens, types = _table(texts, added, rows, unknown, set())
    special = _special(tokenizer, rows) | {"unk": unknown}
    notes = _notes("", None, sum(at >= rows for at in texts))
    if scheme == "always" and not collapse:
        notes.append("llama.cpp puts a space before a text, or what follows a special token, that begins with one, too")
    if any(float(np.float32(score)) != score for score in normal):
        notes.append("scores are rounded to float32, which may decide between two ways to cut a text with the same sum")
    if charsmap is not None:
        notes.append("llama.cpp replaces sequences of characters of the table, the tokenizer single ones")
    if collapse:
        notes.append("the tokenizer strips any white space at the end of a text, and llama.cpp spaces")
    return Vocabulary(
        model="t5",
        pre="default",
        tokens=tokens,
        types=types,
        scores=[pieces[at][1] if at < len(pieces) else 0.0 for at in range(rows)],
        merges=None,
        prefix=scheme == "always",
        collapse=collapse,
        charsmap=charsmap,
        special=special,
        adds=_adds(tokenizer, special),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        notes=notes,
    )


_ONE_SPACE = {("Strip", True, "None"), ("Replace", None, str({"Regex": " {2,}"}))}
"""The normalizers with which spaces that follow each other are one, and those at the end none."""


def _table(
    texts: Mapping[int, str], added: Mapping[int, dict[str, Any]], rows: int, unknown: int | None, bytes_: set[int]
) -> tuple[list[str], list[int]]:
    """Return the texts by id as llama.cpp has them, and the type of each.

    unknown, bytes_  ids of the token of unknown characters, and of those of bytes
    """
    tokens, types = [f"[PAD{at}]" for at in range(rows)], [UNUSED] * rows
    for number, token in texts.items():
        if number < rows:
            plain = BYTE if number in bytes_ else UNKNOWN if number == unknown else NORMAL
            tokens[number], types[number] = _typed(token, added.get(number), plain)
    if len(set(tokens)) < rows:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise _refused(f"the token {twice[:60]!r} twice", "llama.cpp needs a text for each id")
    return tokens, types


def _typed(token: str, added: dict[str, Any] | None, plain: int) -> tuple[str, int]:
    """Return the text of a token as llama.cpp has it, and its type, which is `plain` for a token that was not added."""
    if added is None:
        return token, plain
    if added["special"] or _looks_special(token):
        return token, CONTROL
    return token.replace(_SPACE, " "), USER_DEFINED


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _looks_special(token: str) -> bool:
    """Return whether llama.cpp's converter takes an added token for a control token by its text."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    ends = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return any(token.startswith(first) and token.endswith(last) for first, last in ends)


def _special(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    """Return name -> id of the special tokens."""
    given: dict[str, Any] = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id, "mask": tokenizer.mask_token_id,
    }  # fmt: skip
    if given["eos"] is None:
        raise _refused("no eos_token", "llama.cpp takes token 11 or 2 for the end where a file names none")
    return {name: number for name, number in given.items() if number is not None and number < rows}


def _adds(tokenizer: PreTrainedTokenizerBase, special: Mapping[str, int]) -> dict[str, bool]:
    """Return which special tokens texts get, of what the tokenizer does with one."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for bos in (False, True):
        for eos in (False, True):
            before = [special["bos"]] if bos and "bos" in special else []
            if whole == before + plain + ([special["eos"]] if eos else []):
                return {"bos": bos, "eos": eos}
    shown = tokenizer.convert_ids_to_tokens(whole)
    raise _refused(f"a text that becomes {shown}"[:200], "llama.cpp adds the bos and the eos token alone")


def _refused(found: str, rule: str, fix: str = LIKE) -> ExportError:
    return ExportError("export to gguf: the tokenizer", found=found, rule=rule, fix=fix)
