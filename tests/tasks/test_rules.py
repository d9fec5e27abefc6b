"""Settings of scores: shots, normalization, stop texts, extractors, sliding windows, rank classification, MMLU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

from dovetail.errors import DataError
from dovetail.runs.recipe import Recipe
from dovetail.tasks.find import load_task
from dovetail.tasks.mmlu import mmlu_tasks
from dovetail.tasks.rank import rank_classification
from dovetail.tasks.rules import Scoring
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.scoring.shots import with_shots
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import IGNORED, RowMaker
from lm_eval_cases import MODELS
from small_tokenizers import bytes_bpe

PROMPTS = ["The sun is", "Question: how many?", "A year has 365", "The moon is not"]
ANSWERS = [" a star", " eight legs", " days", " a star."]


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return MODELS["llama"][0](), bytes_bpe("<s> $A")


def generation(rules: Scoring, answers: list[str] = ANSWERS) -> Task:
    records = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    return Task("made", "generation", "exact_match", {"train": records[:3], "test": records}, rules)


def test_shots_are_answered_examples_but_not_the_record_itself() -> None:
    task = generation(Scoring(shots=2, description="Answer.\n\n"))
    found = with_shots(task, "test", None)
    shots = [prompt + answer + "\n\n" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert found[3]["prompt"] == "Answer.\n\n" + shots[0] + shots[1] + PROMPTS[3]
    assert found[0]["prompt"] == "Answer.\n\n" + shots[1] + shots[2] + PROMPTS[0]
    with pytest.raises(DataError, match="2 examples for 3 shots"):
        with_shots(replace(task, scoring=Scoring(shots=3)), "test", None)
    choice = Task("c", "choice", "accuracy", {"test": [
        {"prompt": "One", "choices": [" a", " b"], "label": 1}, {"prompt": "Two", "choices": [" c", " d"], "label": 0},
    ]}, Scoring(shots=1, shots_split="test"))  # fmt: skip
    assert [record["prompt"] for record in with_shots(choice, "test", None)] == ["Two c\n\nOne", "One b\n\nTwo"]
    texts = Task("t", "text", "perplexity", {"test": [{"text": "a"}]}, Scoring(shots=1))
    with pytest.raises(DataError, match="need records with a prompt"):
        with_shots(texts, "test", None)


EXTRACTED = [
    ("####", "3 * 6 = 18\n#### 18", "18"),
    ("####", "#### 1,018.\nQuestion: #### 5", "1018"),
    ("####", "18", None),
    ("####", "#### -3", "-3"),
    ("last_number", "She has 3 cats and $1,200.50.", "1200.50"),
    ("last_number", "7", "7"),
    ("last_number", "none", None),
    (r"answer is (\w+)", "the answer is yes, the answer is no", "yes"),
    (r"\d+ apples", "it is 5 apples", "5 apples"),
]


@pytest.mark.parametrize(("how", "text", "wanted"), EXTRACTED)
def test_extractors(how: str, text: str, wanted: str | None) -> None:
    assert Scoring(extract=how).extracted(text) == wanted


def test_an_answer_is_compared_by_what_is_extracted() -> None:
    assert Scoring(extract="####").right("so it is\n#### 1,018", "x #### 1018")
    assert not Scoring(extract="####").right("1018", "#### 1018")
    assert Scoring(extract=r"(yes|no)", ignore_case=True).right("well, yes", "Yes ")
    assert not Scoring().right("Yes", "yes")
    assert Scoring(stop=("\n", "Q:")).stopped("18 Q: what?\nno") == "18 "


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"extract": "(a"}, "regular expression"), ({"stop": ["a", ""]}, "at least one character"),
     ({"shots": True}, "integer"), ({"stride": 0}, "greater than or equal to 1"), ({"shot": 1}, "Extra inputs")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=said):
        Scoring(**settings)


def test_generation_ends_at_a_stop_text(model: tuple[Any, Any]) -> None:
    """The text up to the stop is that of the unstopped continuation."""
    outputs: dict[str, list[str]] = {}
    free = generation(Scoring(max_new_tokens=24))
    evaluate(*model, free, progress=False, on_outputs=outputs.__setitem__)
    whole = outputs["made"]
    stop = next(text[6:8] for text in whole if text[6:8].strip())
    stopped = generation(Scoring(max_new_tokens=24, stop=(stop,)), [text.split(stop)[0] for text in whole])
    scores = evaluate(*model, stopped, progress=False, on_outputs=outputs.__setitem__)
    assert outputs["made"] == [text.split(stop)[0] for text in whole] != whole
    assert scores["made"]["exact_match"] == 1


def summed(network: Any, row: dict[str, Any]) -> float:
    """The log-likelihood of the labelled tokens of a row, by the definition."""
    ids = torch.tensor([row["input_ids"]])
    each = torch.log_softmax(network(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])
    return float(each[-sum(label != IGNORED for label in row["labels"]) :].sum())


def test_normalization(model: tuple[Any, Any]) -> None:
    """One record per unit of length, chosen by the definition from the log-likelihoods."""
    records = [{"prompt": prompt, "choices": [" copper", " Ökologie été", " a", " water and sunlight"], "label": label}
               for label, prompt in enumerate(PROMPTS)]  # fmt: skip
    make = RowMaker(model[1], False, 512)
    rows = make.choices(records, right=False)
    with torch.inference_mode():
        sums = [summed(model[0], row) for row in rows]
    lengths = {
        "characters": [len(choice) - 1 for record in records for choice in record["choices"]],
        "bytes": [len(choice.encode()) - 1 for record in records for choice in record["choices"]],
        "tokens": [sum(label != IGNORED for label in row["labels"]) for row in rows],
    }
    for unit, sizes in lengths.items():
        each = [value / size for value, size in zip(sums, sizes, strict=True)]
        best = [max(range(4), key=each[4 * at : 4 * at + 4].__getitem__) for at in range(4)]
        task = Task("c", "choice", "accuracy", {"test": records}, Scoring.model_validate({"normalize": unit}))
        found = evaluate(*model, task, progress=False)["c"]["accuracy_norm"]
        assert found == sum(choice == label for label, choice in enumerate(best)) / 4


def test_sliding_windows_score_each_token_once_with_most_context(model: tuple[Any, Any]) -> None:
    network, tokenizer = model
    text = "The sun is a star. The moon is not a star. Ökologie: a spider has eight legs."
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    for length, stride in ((16, 4), (16, 15), (16, 100), (len(ids), 1), (8, 1)):
        step, total = min(stride, length - 1), 0.0
        first = min(length, len(ids))
        ends = [first, *range(first + step, len(ids), step)] + ([len(ids)] if first < len(ids) else [])
        done = 1
        for end in ends:
            piece = torch.tensor([ids[max(0, end - length) : end]])
            with torch.inference_mode():
                each = torch.log_softmax(network(piece).logits[0, :-1].double(), -1).gather(1, piece[0, 1:, None])
            total -= float(each[-(end - done) :].sum())
            done = end
        task = Task("t", "text", "perplexity", {"test": [{"text": text}]}, Scoring(stride=stride))
        scores = evaluate(network, tokenizer, task, max_length=length, progress=False)["t"]
        assert math.isclose(scores["nats_per_token"], total / (len(ids) - 1), rel_tol=1e-6)
        assert scores.get("windows", 1) == len(ends)


def test_perplexities_per_word_and_byte(model: tuple[Any, Any]) -> None:
    texts = ["The sun is a star.", "Ökologie été  x"]
    task = Task("t", "text", "perplexity", {"test": [{"text": text} for text in texts]})
    scores = evaluate(*model, task, progress=False)["t"]
    tokens = sum(len(model[1](text, add_special_tokens=False)["input_ids"]) for text in texts)
    total = scores["nats_per_token"] * tokens
    assert scores["word_perplexity"] == pytest.approx(math.exp(total / 8))
    assert scores["byte_perplexity"] == pytest.approx(math.exp(total / (18 + 18)))
    assert scores["bits_per_byte"] == pytest.approx(total / 36 / math.log(2))


def test_an_encoder_decoder_has_no_stride() -> None:
    task = Task("t", "text", "perplexity", {"test": [{"text": "The sun"}]}, Scoring(stride=4))
    with pytest.raises(DataError, match="a stride needs a decoder-only model"):
        evaluate(MODELS["t5"][0](), bytes_bpe("$A </s>"), task, progress=False)


def test_rank_classification_is_a_choice_of_label_words(tmp_path: Path, model: tuple[Any, Any]) -> None:
    rows = [{"text": "a fine film {pair}", "label": 1}, {"text": "a bad one", "label": 0}]
    (tmp_path / "films.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe.parse({
        "model": "playground", "chain": "lora",
        "data": {"train": "films.jsonl", "validation": "films.jsonl", "label_words": ["bad", "good"],
                 "prompt": "Review: {text}\nIt is", "scoring": {"normalize": "tokens"}},
    }, folder=tmp_path)  # fmt: skip
    task = load_task(recipe.data)
    assert (task.kind, task.metric, task.scoring.normalize) == ("choice", "accuracy", "tokens")
    assert task.split("train")[0] == {
        "prompt": "Review: a fine film {pair}\nIt is", "choices": [" bad", " good"], "label": 1
    }  # fmt: skip
    assert evaluate(*model, task, split="validation", progress=False)[task.name]["n"] == 2
    labels = Task("films", "classification", "accuracy", {"test": rows})
    assert rank_classification(labels, ["bad", "good"]).split("test")[1]["prompt"] == "a bad one\nAnswer:"
    for words, prompt, said in (
        (["bad"], None, "each label must have a word"), (["bad", "bad"], None, "must differ"),
        (["bad", "good"], "It is", "must contain {text}"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            rank_classification(labels, words, prompt)
    with pytest.raises(DataError, match="texts with integer labels"):
        rank_classification(generation(Scoring()), ["a", "b"])
    with pytest.raises(DataError, match="records without a pair"):
        rank_classification(labels, ["bad", "good"], "{text} {pair}")


def test_mmlu_from_local_files_of_both_layouts(tmp_path: Path, model: tuple[Any, Any]) -> None:
    questions = [(f'Which, "{n}", is a metal?', ["copper", "water", "a, star", "eggs"], n % 4) for n in range(8)]
    for split, rows in (("dev", questions[:5]), ("test", questions[5:])):
        (tmp_path / "archive" / split).mkdir(parents=True)
        lines = [",".join(json.dumps(part).replace('\\"', '""') for part in (question, *choices, "ABCD"[answer]))
                 for question, choices, answer in rows]  # fmt: skip
        (tmp_path / "archive" / split / f"high_school_metals_{split}.csv").write_text("\n".join(lines) + "\n")
        folder = tmp_path / "hub" / "high_school_metals"
        folder.mkdir(parents=True, exist_ok=True)
        records = [{"question": question, "subject": "metals", "choices": choices, "answer": answer}
                   for question, choices, answer in rows]  # fmt: skip
        (folder / f"{split}-00000-of-00001.jsonl").write_text("\n".join(map(json.dumps, records)))
    (task,), (other,) = mmlu_tasks(tmp_path / "archive"), mmlu_tasks(tmp_path / "hub", ["high_school_metals"])
    assert task == other
    assert task.name == "mmlu_high_school_metals"
    prompt = with_shots(task, "test", 1)[0]["prompt"]
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about high school metals.\n\n"
        'Which, "0", is a metal?\nA. copper\nB. water\nC. a, star\nD. eggs\nAnswer: A\n\n'
    )
    assert prompt.endswith('Which, "5", is a metal?\nA. copper\nB. water\nC. a, star\nD. eggs\nAnswer:')
    assert prompt.count("Answer:") == 6
    assert evaluate(*model, task, progress=False)[task.name]["n"] == 3
    with pytest.raises(DataError, match="the subjects here are high_school_metals"):
        mmlu_tasks(tmp_path / "archive", ["anatomy"])
    with pytest.raises(DataError, match="no file of a subject"):
        mmlu_tasks(tmp_path)
    broken = tmp_path / "archive" / "test" / "high_school_metals_test.csv"
    broken.write_text("What?,a,b,c,d,E\n")
    with pytest.raises(DataError, match=r"line 1\n.*answer E"):
        mmlu_tasks(tmp_path / "archive")


def test_conversations_have_sample_answers_beside_their_perplexity(model: tuple[Any, Any]) -> None:
    turns = [{"role": "user", "content": "Which is a metal?"}, {"role": "assistant", "content": "copper"}]
    task = Task("t", "chat", "perplexity", {"test": [{"messages": turns}] * 4})
    outputs: dict[str, list[str]] = {}
    scores = evaluate(*model, task, progress=False, on_outputs=outputs.__setitem__)
    assert len(outputs["t"]) == 3
    assert evaluate(*model, task, progress=False) == scores
