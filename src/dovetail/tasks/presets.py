"""Data sets that papers use, by name: from the columns of their published files to records.

A preset reads a data set of the hub, or local files of the same schema. Prompts of multiple choice are those of lm-eval
0.4.13, so scores can be compared; WinoGrande is scored over the rest of the sentence with its option, where lm-eval
scores the rest alone. Test splits without labels (PIQA, HellaSwag, WinoGrande, GLUE, SuperGLUE) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dovetail.errors import DataError
from dovetail.tasks.files import Row, typed
from dovetail.tasks.formats import FORMATS
from dovetail.tasks.rules import MARKED, Scoring
from dovetail.tasks.task import METRICS, Record

Columns = Mapping[str, Any]
Records = Iterator[tuple[str, Record]]
"""Where a record comes from, and the record."""

TRAIN_VALIDATION = {"train": "train", "validation": "validation"}
TRAIN_TEST = {"train": "train", "test": "test"}
ALL = {"train": "train", "validation": "validation", "test": "test"}
TRAIN = {"train": "train"}


@dataclass(frozen=True)
class Preset:
    """A data set by name.

    kind     of its records
    dataset  its name on the hub
    splits   split -> the data set's name for it
    read     the rows of a split -> records; raises ValueError or KeyError (of a column) for a row that makes none
    subset   of the data set
    metric   the kind's first when not given
    scoring  of its answers, where the data part of a recipe states none
    parts    presets whose records it has, one after the other; then dataset and read are not used
    """

    kind: str
    dataset: str
    splits: Mapping[str, str]
    read: Callable[[Iterable[Row]], Records]
    subset: str | None = None
    metric: str | None = None
    scoring: Scoring = field(default_factory=Scoring)
    parts: tuple[str, ...] = ()


def read_preset(name: str, rows: Iterable[Row]) -> Records:
    """Yield the records of the rows of a split; DataError names the row that does not have the preset's schema."""
    last = ""

    def seen() -> Iterator[Row]:
        nonlocal last
        for row in rows:
            last = row.where
            yield row

    try:
        yield from PRESETS[name].read(seen())
    except (KeyError, ValueError) as error:
        missing = isinstance(error, KeyError)
        raise DataError(
            last,
            found=f"no column {error.args[0]!r}" if missing else str(error),
            rule=f"a row of the preset {name} must have the columns of the data set {PRESETS[name].dataset}",
            fix="correct the record, or name a format and its fields in place of the preset",
        ) from None


def metric_of(name: str) -> str:
    """Return the metric of a preset."""
    return PRESETS[name].metric or METRICS[PRESETS[name].kind][0]


# Values.


def _text(columns: Columns, name: str) -> str:
    value = columns[name]
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}"[:200] + ", which is no text")
    return value


def _texts(columns: Columns, name: str) -> list[str]:
    values = typed(columns[name], list)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name}={values!r}"[:200] + ", which is no list of texts")
    return values


def _number(columns: Columns, name: str) -> int:
    """Return the number of a label, which some files hold as a text or as true and false."""
    value = columns[name]
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.lower(), typed(value, int))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise ValueError(f"{name}={value!r}"[:200] + ", which is no integer")
    return int(value)


def _choice(prompt: str, choices: Iterable[str], label: int) -> Record:
    return {"prompt": prompt, "choices": [f" {choice}" for choice in choices], "label": label}


# Readers.


def _each(record: Callable[[Columns], Record]) -> Callable[[Iterable[Row]], Records]:
    """Return the reader of a data set whose rows are one record each."""

    def read(rows: Iterable[Row]) -> Records:
        for row in rows:
            yield row.where, record(row.columns)

    return read


def _several(records: Callable[[Columns], Iterable[Record]]) -> Callable[[Iterable[Row]], Records]:
    """Return the reader of a data set whose rows are several records, or none."""

    def read(rows: Iterable[Row]) -> Records:
        for row in rows:
            for record in records(row.columns):
                yield row.where, record

    return read


def _format(name: str, *fields: str) -> Callable[[Iterable[Row]], Records]:
    """Return the reader of a data set in a format whose fields are columns of the same name."""

    def record(columns: Columns) -> Record:
        found = {field: columns[field] for field in fields}
        if null := [field for field, value in found.items() if value is None]:
            raise ValueError(f"null in column {null[0]!r}")
        return FORMATS[name].record(found)

    return _each(record)


def _turns(question: str, answer: str) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _hc3(columns: Columns) -> Iterator[Record]:
    for answer in _texts(columns, "chatgpt_answers"):
        yield _turns(_text(columns, "question"), answer)


def _unnatural(columns: Columns) -> Iterator[Record]:
    instances = typed(columns["instances"], list)
    if not isinstance(instances, list) or not all(isinstance(each, Mapping) for each in instances):
        raise ValueError(f"instances={instances!r}"[:200] + ", which is no list of mappings")
    for each in instances:
        yield _turns(_text(each, "instruction_with_input"), _text(each, "output"))


def _top_replies(rows: Iterable[Row]) -> Records:
    """Yield one conversation per tree of messages, which takes the reply of the best rank at every level."""
    roots: list[Any] = []
    replies: dict[str, list[tuple[int, int, Columns, str]]] = {}
    for number, row in enumerate(rows):
        columns = row.columns
        parent, rank = columns["parent_id"], columns["rank"]
        for name in ("message_id", "text", "role"):
            _text(columns, name)
        if not parent:
            roots.append((columns, row.where))
        else:
            # A reply without a rank comes after those with one.
            place = 1 << 30 if rank in (None, "") else _number(columns, "rank")
            replies.setdefault(parent, []).append((place, number, columns, row.where))
    for root, where in roots:
        path, here = [root], root
        while found := replies.get(here["message_id"]):
            _, _, here, _ = min(found, key=lambda reply: reply[:2])
            path.append(here)
        roles = {"prompter": "user", "assistant": "assistant"}
        messages = [{"role": roles[each["role"]], "content": each["text"]} for each in path]
        if messages[-1]["role"] == "user":
            messages.pop()
        if messages:
            yield where, {"messages": messages}


def _gsm8k(columns: Columns) -> Record:
    return {"prompt": f"Question: {_text(columns, 'question')}\nAnswer:", "answer": f" {_text(columns, 'answer')}"}


def _boolq(columns: Columns) -> Record:
    label = _number(columns, "answer" if "answer" in columns else "label")
    prompt = f"{_text(columns, 'passage')}\nQuestion: {_text(columns, 'question')}?\nAnswer:"
    return _choice(prompt, ("no", "yes"), label)


def _piqa(columns: Columns) -> Record:
    prompt = f"Question: {_text(columns, 'goal')}\nAnswer:"
    return _choice(prompt, (_text(columns, "sol1"), _text(columns, "sol2")), _number(columns, "label"))


def _hellaswag(columns: Columns) -> Record:
    context = f"{_text(columns, 'ctx_a')} {_text(columns, 'ctx_b').capitalize()}"
    prompt = _wikihow(f"{_text(columns, 'activity_label')}: {context}")
    return _choice(prompt, map(_wikihow, _texts(columns, "endings")), _number(columns, "label"))


def _wikihow(text: str) -> str:
    """Return a text of HellaSwag without the marks of WikiHow, as lm-eval does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(columns: Columns) -> Record:
    before, gap, after = _text(columns, "sentence").partition("_")
    if not gap:
        raise ValueError(f"sentence={before!r}"[:200] + ", which has no gap _")
    options = [_text(columns, "option1") + after, _text(columns, "option2") + after]
    return _choice(before.rstrip(), options, _number(columns, "answer") - 1)


def _lettered(question: str, prompt: str) -> Callable[[Columns], Record]:
    """Return the reader of ARC's and OpenBookQA's rows: choices with their letters, and the letter of the right one.

    Rows with a list of choices and the index of the right one are read too.

    question  the column of the question, or `question`
    prompt    of the question
    """

    def record(columns: Columns) -> Record:
        asked = _text(columns, question if question in columns else "question")
        choices = columns["choices"]
        if isinstance(choices, Mapping):
            letters, answer = _texts(choices, "label"), _text(columns, "answerKey")
            if answer not in letters:
                raise ValueError(f"answerKey={answer!r}, which is none of {letters}")
            return _choice(prompt.format(asked), _texts(choices, "text"), letters.index(answer))
        return _choice(prompt.format(asked), _texts(columns, "choices"), _number(columns, "answer"))

    return record


def _labels(*texts: str, real: bool = False) -> Callable[[Iterable[Row]], Records]:
    """Return the reader of a labelled text, or two; each of `texts` is a column, or a text with {columns}.

    real   the label is a value, and no number of a class
    """

    def record(columns: Columns) -> Record:
        found: dict[str, Any] = {}
        for name, text in zip(("text", "pair"), texts, strict=False):
            names = re.findall(r"\{(\w+)\}", text)
            filled = text.format(**{each: _text(columns, each) for each in names})
            found[name] = filled if names else _text(columns, text)
        if not real:
            return {**found, "label": _number(columns, "label")}
        value = typed(columns["label"], float)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"label={value!r}"[:200] + ", which is no number")
        return {**found, "label": float(value)}

    return _each(record)


def _copa(columns: Columns) -> Record:
    words = {"cause": "because", "effect": "therefore"}
    asked = _text(columns, "question")
    if asked not in words:
        raise ValueError(f"question={asked!r}, which is neither cause nor effect")
    premise = _text(columns, "premise").strip().removesuffix(".")
    choices = [_text(columns, name) for name in ("choice1", "choice2")]
    choices = [choice[:1].lower() + choice[1:] for choice in choices]
    return _choice(f"{premise} {words[asked]}", choices, _number(columns, "label"))


def _record(columns: Columns) -> Iterator[Record]:
    """Yield a cloze question with the entities of its passage as choices; the first answer is the right one."""
    entities, answers = _texts(columns, "entities"), _texts(columns, "answers")
    query, passage = _text(columns, "query"), _text(columns, "passage").replace("\n@highlight\n", "\n- ")
    before, gap, after = query.partition("@placeholder")
    if not gap:
        raise ValueError(f"query={query!r}"[:200] + ", which has no @placeholder")
    entities = list(dict.fromkeys(entities))
    if answers and answers[0] in entities:
        prompt = f"{passage}\n- {before}".rstrip()
        yield _choice(prompt, [f"{entity}{after}" for entity in entities], entities.index(answers[0]))


def _glue(subset: str, *texts: str, metric: str = "accuracy", validation: str = "validation") -> Preset:
    kind = "regression" if metric == "pearson" else "classification"
    splits = {"train": "train", "validation": validation}
    return Preset(kind, "nyu-mll/glue", splits, _labels(*texts, real=kind == "regression"), subset, metric)


def _super(subset: str, *texts: str) -> Preset:
    return Preset("classification", "aps/super_glue", TRAIN_VALIDATION, _labels(*texts), subset, "accuracy")


_GSM8K = Scoring(extract=MARKED, stop=("Question:",))
_ALPACA = _format("alpaca", "instruction", "input", "output")
_ARC = _each(_lettered("question", "Question: {}\nAnswer:"))
COMMONSENSE = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks that QR-Adaptor and SQFT score."""

PRESETS: Mapping[str, Preset] = {
    # Instructions and conversations: the assistant's turns are trained.
    "alpaca": Preset("chat", "tatsu-lab/alpaca", TRAIN, _ALPACA),
    "alpaca-cleaned": Preset("chat", "yahma/alpaca-cleaned", TRAIN, _ALPACA),
    "hc3": Preset("chat", "Hello-SimpleAI/HC3", TRAIN, _several(_hc3), "all"),
    "unnatural-core": Preset("chat", "mrm8488/unnatural-instructions-core", TRAIN, _several(_unnatural)),
    "oasst1": Preset("chat", "OpenAssistant/oasst1", TRAIN_VALIDATION, _top_replies),
    "hh-rlhf": Preset("chat", "Anthropic/hh-rlhf", TRAIN_TEST, _format("preference", "chosen", "rejected")),
    # Questions with a text as answer, and multiple choice.
    "gsm8k": Preset("generation", "openai/gsm8k", TRAIN_TEST, _each(_gsm8k), "main", scoring=_GSM8K),
    "boolq": Preset("choice", "google/boolq", TRAIN_VALIDATION, _each(_boolq)),
    "piqa": Preset("choice", "baber/piqa", TRAIN_VALIDATION, _each(_piqa)),
    "hellaswag": Preset("choice", "Rowan/hellaswag", TRAIN_VALIDATION, _each(_hellaswag)),
    "winogrande": Preset("choice", "allenai/winogrande", TRAIN_VALIDATION, _each(_winogrande), "winogrande_xl"),
    "arc_easy": Preset("choice", "allenai/ai2_arc", ALL, _ARC, "ARC-Easy"),
    "arc_challenge": Preset("choice", "allenai/ai2_arc", ALL, _ARC, "ARC-Challenge"),
    "openbookqa": Preset("choice", "allenai/openbookqa", ALL, _each(_lettered("question_stem", "{}")), "main"),
    "commonsense-7": Preset("choice", "", TRAIN_VALIDATION, _several(lambda _: ()), parts=COMMONSENSE),
    # GLUE and SuperGLUE: a head over one text or two.
    "glue/cola": _glue("cola", "sentence", metric="matthews"),
    "glue/sst2": _glue("sst2", "sentence"),
    "glue/mrpc": _glue("mrpc", "sentence1", "sentence2"),
    "glue/qqp": _glue("qqp", "question1", "question2"),
    "glue/stsb": _glue("stsb", "sentence1", "sentence2", metric="pearson"),
    "glue/mnli": _glue("mnli", "premise", "hypothesis", validation="validation_matched"),
    "glue/qnli": _glue("qnli", "question", "sentence"),
    "glue/rte": _glue("rte", "sentence1", "sentence2"),
    "glue/wnli": _glue("wnli", "sentence1", "sentence2"),
    "superglue/boolq": _super("boolq", "question", "passage"),
    "superglue/cb": _super("cb", "premise", "hypothesis"),
    "superglue/copa": Preset("choice", "aps/super_glue", TRAIN_VALIDATION, _each(_copa), "copa"),
    "superglue/multirc": _super("multirc", "paragraph", "{question} {answer}"),
    "superglue/record": Preset("choice", "aps/super_glue", TRAIN_VALIDATION, _several(_record), "record"),
    "superglue/rte": _super("rte", "premise", "hypothesis"),
    "superglue/wic": _super("wic", "{word}: {sentence1}", "{sentence2}"),
    "superglue/wsc": _super("wsc", "text", "{span2_text}: {span1_text}"),
}
"""Name -> preset."""
