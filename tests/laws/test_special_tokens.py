"""Begin and end tokens come once, whether the tokenizer adds them or the record brings its own; the latter is said."""

from __future__ import annotations

import pytest

from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import IGNORED, RowMaker
from lm_eval_cases import MODELS
from small_tokenizers import TOKENIZERS

TEXT = "The sun is a star"
FORMS = {None: (0, 0), "<s> $A": (1, 0), "<s> $A </s>": (1, 1), "$A </s>": (0, 1)}
BEGIN, END = 1, 2
CASES = [(name, form) for name in TOKENIZERS for form in FORMS]


def records(kind: str, begin: str, end: str = "") -> list[dict]:
    return {
        "generation": [{"prompt": f"{begin}{TEXT}", "answer": f" a moon{end}"}],
        "choice": [{"prompt": f"{begin}{TEXT}", "choices": [" a moon", " days"], "label": 0}],
        "pairs": [{"good": f"{begin}{TEXT}", "bad": "The"}],
        "text": [{"text": f"{begin}{TEXT}"}],
        "classification": [{"text": f"{begin}{TEXT}{end}", "label": 1}],
    }[kind]


@pytest.mark.parametrize("kind", ["generation", "choice", "pairs", "text"])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_decoder_reads_one_begin_token(name: str, form: str | None, kind: str) -> None:
    make_rows = RowMaker(TOKENIZERS[name](form), encoder_decoder=False, max_length=64)
    for row in make_rows.examples(kind, records(kind, "<s>", "</s>")):
        assert row["input_ids"].count(BEGIN) == 1
        assert row["input_ids"][0] == BEGIN
        assert BEGIN not in row["labels"]
        assert row["labels"].count(END) == (kind in ("generation", "choice"))
    (plain,) = RowMaker(TOKENIZERS[name](form), encoder_decoder=False, max_length=64).examples(kind, records(kind, ""))
    assert plain["input_ids"].count(BEGIN) == (FORMS[form][0] or kind in ("pairs", "text"))


@pytest.mark.parametrize(("name", "form"), CASES)
def test_an_encoder_reads_one_of_each(name: str, form: str | None) -> None:
    begins, ends = FORMS[form]
    tokenizer = TOKENIZERS[name](form)
    for kind in ("generation", "classification"):
        begin, end = "<s>" * begins, "</s>" * ends
        for marks in (("", ""), (begin, ""), (begin, end)):
            make_rows = RowMaker(tokenizer, encoder_decoder=kind == "generation", max_length=64)
            chosen = records(kind, marks[0], marks[1])
            if kind == "generation":
                chosen[0]["prompt"] += marks[1]
            (row,) = make_rows.examples(kind, chosen)
            assert (row["input_ids"].count(BEGIN), row["input_ids"].count(END)) == FORMS[form]
            if kind == "generation":
                assert row["labels"].count(END) == 1


@pytest.mark.parametrize("kind", ["generation", "choice", "text"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_rendered_chat_is_tokenized_as_the_template_does(name: str, kind: str) -> None:
    tokenizer = TOKENIZERS[name]("<s> $A")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": TEXT}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    (row,) = RowMaker(tokenizer, encoder_decoder=False, max_length=64).examples(kind, [{
        "prompt": prompt, "text": prompt, "answer": " a moon", "choices": [" a moon"], "label": 0,
    }])  # fmt: skip
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert row["input_ids"][: len(wanted)] == wanted
    assert row["labels"][0] == IGNORED


def test_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = MODELS["llama"][0]()
    task = Task("t", "text", "perplexity", {"test": records("text", "<s>") + records("text", "")})
    scores = evaluate(model, TOKENIZERS["pieces"]("<s> $A"), task)
    assert "1 texts bring begin or end tokens" in capsys.readouterr().err
    plain = Task("t", "text", "perplexity", {"test": records("text", "")})
    assert evaluate(model, TOKENIZERS["words"]("<s> $A"), plain, progress=False)["t"]["n"] == 1
    assert scores["t"]["n"] == 2
    assert capsys.readouterr().err == ""
