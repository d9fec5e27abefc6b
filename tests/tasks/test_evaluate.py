"""Scores against a slow, plain computation; batches; the model left as it was."""

from __future__ import annotations

import math

import pytest
import torch

from dovetail.compression.calibration import calibration_batches
from dovetail.errors import DataError
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import IGNORED, Collator, RowMaker, encode
from small_models import BEGIN, END, PAD, bert, llama, make_tokenizer, t5

PROMPTS = ["the sum of one plus two is", "two plus two is", "is", "the sum of the sum of one plus three plus four is"]
CHOICES = Task("choices", "choice", "accuracy", {"test": [
    {"prompt": prompt, "choices": [" one", " two three four", " nine nine"], "label": at % 3}
    for at, prompt in enumerate(PROMPTS)
]})  # fmt: skip
PAIRS = Task("pairs", "pairs", "accuracy", {"test": [
    {"good": prompt, "bad": "of " + prompt} for prompt in PROMPTS
] + [{"good": "of of of", "bad": "one"}]})  # fmt: skip
TEXTS = Task("texts", "text", "perplexity", {"test": [{"text": prompt} for prompt in PROMPTS]})


def loss(model: torch.nn.Module, context: list[int], said: list[int]) -> float:
    """Sum of the negative log-likelihoods of `said` after `context`, one row, by the model's own forward."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            out = model.eval()(input_ids=torch.tensor([context]), labels=torch.tensor([said]))
        else:
            labels = torch.tensor([[IGNORED] * len(context) + said])
            out = model.eval()(input_ids=torch.tensor([context + said]), labels=labels)
    return out.loss.item() * len(said)


@pytest.mark.parametrize("make", [llama, t5])
def test_likelihood_scores(make):
    model, tokenizer = make(), make_tokenizer(begin=make is llama, end=make is t5)
    scores = evaluate(model, tokenizer, [CHOICES, PAIRS, TEXTS], batch_size=3, progress=False)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def around(text):
        return [*ids(text), END] if make is t5 else [BEGIN, *ids(text)]

    right = norm = 0
    for record in CHOICES.split("test"):
        nll = [loss(model, around(record["prompt"]), ids(choice)) for choice in record["choices"]]
        lengths = [len(choice) - 1 for choice in record["choices"]]  # without the space that joins it
        right += nll.index(min(nll)) == record["label"]
        norm += min(range(3), key=lambda at: nll[at] / lengths[at]) == record["label"]
    assert scores["choices"] == {"accuracy": right / 4, "accuracy_norm": norm / 4, "n": 4}

    start = [END] if make is t5 else [BEGIN]
    pairs = PAIRS.split("test")
    better = [loss(model, start, ids(pair["good"])) < loss(model, start, ids(pair["bad"])) for pair in pairs]
    assert scores["pairs"] == {"accuracy": sum(better) / 5, "n": 5}

    nats = sum(loss(model, start, ids(text)) for text in PROMPTS) / sum(len(ids(text)) for text in PROMPTS)
    assert scores["texts"]["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert scores["texts"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)


@pytest.mark.parametrize("make", [llama, t5])
def test_generation_is_what_the_model_says_alone(make):
    model, tokenizer = make(), make_tokenizer(end=make is t5)
    answers, wholes = [], []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = model.eval().generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(said[0, 0 if make is t5 else tokens.shape[1] :], skip_special_tokens=True))
        if END in said[0, 1 if make is t5 else tokens.shape[1] :]:
            wholes.append(answers[-1])
    assert len(wholes) < 4
    assert max(len(answer.split()) for answer in answers) > 4
    # What a chat model's settings say is of no account.
    model.generation_config.temperature, model.generation_config.repetition_penalty = 0.5, 3.0
    model.train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]

    def share(answers):
        records = [{"prompt": prompt, "answer": f" {answer}"} for prompt, answer in zip(PROMPTS, answers, strict=True)]
        task = Task("sums", "generation", "exact_match", {"test": records})
        return evaluate(model, tokenizer, task, progress=False)["sums"]["exact_match"]

    cut = [" ".join(answer.split()[:4]) for answer in answers]
    # Answers of four tokens: the model says more than that, which must not count as right.
    assert share(cut) == sum(a == b for a, b in zip(answers, cut, strict=True)) / 4
    # A continuation that ends by itself is found again.
    ended = [answer if answer in wholes else "nothing" for answer in answers]
    assert share(ended) == len(wholes) / 4
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.repetition_penalty == 3.0


def test_greedy_answers_end_at_the_end_token():
    """A model that is made to say "three" and then the end token."""
    model, tokenizer = llama(), make_tokenizer()
    three = tokenizer("three")["input_ids"][0]
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    torch.nn.init.ones_(model.model.norm.weight)
    with torch.no_grad():
        embeddings[:, 0] = 1
        embeddings[three, :2] = torch.tensor([0.0, 1.0])
        head[three, 0] = head[END, 1] = 1
    records = [{"prompt": prompt, "answer": " three" if at else " two"} for at, prompt in enumerate(PROMPTS)]
    task = Task("sums", "generation", "exact_match", {"test": records})
    assert evaluate(model, tokenizer, task, batch_size=3, progress=False) == {"sums": {"exact_match": 0.75, "n": 4}}
    assert evaluate(model, tokenizer, task, limit=1, progress=False) == {"sums": {"exact_match": 0.0, "n": 1}}


def test_heads():
    records = [{"text": prompt, "pair": "one", "label": at % 3} for at, prompt in enumerate(PROMPTS * 3)]
    tokenizer, model = make_tokenizer(), bert(3).eval()
    scores = evaluate(model, tokenizer, Task("labels", "classification", "matthews", {"test": records}), progress=False)
    said = []
    for record in records:
        fields = tokenizer(record["text"], record["pair"], return_tensors="pt")
        said.append(model(**fields).logits.argmax().item())
    assert scores["labels"]["accuracy"] == sum(s == r["label"] for s, r in zip(said, records, strict=True)) / 12

    values = Task("values", "regression", "pearson", {"test": [
        {"text": record["text"], "label": at / 5} for at, record in enumerate(records)
    ]})  # fmt: skip
    model = bert(1).eval()
    figures = evaluate(model, tokenizer, values, batch_size=5, progress=False)["values"]
    said = torch.stack([model(**tokenizer(r["text"], return_tensors="pt")).logits[0, 0] for r in values.split("test")])
    expected = torch.corrcoef(torch.stack([said.detach().double(), torch.arange(12.0).double()]))[0, 1].item()
    assert figures["pearson"] == pytest.approx(expected, abs=1e-5)
    assert -1 <= figures["spearman"] <= 1
    torch.nn.init.zeros_(model.classifier.weight)
    assert evaluate(model, tokenizer, values, progress=False)["values"]["pearson"] == 0.0


def test_rows():
    tokenizer = make_tokenizer()
    record = {"prompt": "one plus two is", "answer": "three"}
    one, plus, two, is_, three = tokenizer("one plus two is three")["input_ids"]
    assert encode("generation", [record], tokenizer, encoder_decoder=False, max_length=64) == [
        {"input_ids": [one, plus, two, is_, three, END], "labels": [IGNORED] * 4 + [three, END]}
    ]
    (cut,) = encode("generation", [record], tokenizer, encoder_decoder=False, max_length=4)
    assert cut["input_ids"] == [two, is_, three, END]
    with pytest.raises(DataError, match="record 0"):
        encode("generation", [record], tokenizer, encoder_decoder=False, max_length=2)
    (row,) = encode("generation", [record], make_tokenizer(end=True), encoder_decoder=True, max_length=64)
    assert row == {"input_ids": [one, plus, two, is_, END], "labels": [three, END]}
    begun = encode("generation", [record], make_tokenizer(begin=True), encoder_decoder=False, max_length=4)[0]
    assert begun["input_ids"] == [BEGIN, is_, three, END]
    rows = encode("text", [{"text": "one plus two is three"}], tokenizer, encoder_decoder=False, max_length=3)
    assert [row["input_ids"] for row in rows] == [[BEGIN, one, plus], [plus, two, is_], [is_, three]]
    assert [row["labels"][1:] for row in rows] == [[one, plus], [two, is_], [three]]
    left = Collator(PAD, "left")(RowMaker(tokenizer, False, 9).prompts(["one", "one plus"]))
    assert left["input_ids"].tolist() == [[PAD, one], [one, plus]]
    assert left["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_calibration_batches():
    task = Task("sums", "generation", "exact_match", {"train": [{"prompt": p, "answer": "one"} for p in PROMPTS * 9]})
    batches = calibration_batches(task, make_tokenizer(), samples=20, batch_size=8, seed=1)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 4]
    assert set(batches[0]) == {"input_ids", "attention_mask"}
    again = calibration_batches(task, make_tokenizer(), samples=20, batch_size=8, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    batches = calibration_batches(task, make_tokenizer(end=True), samples=4, decoder_start=PAD)
    assert t5()(**batches[0]).logits.shape[1] == batches[0]["decoder_input_ids"].shape[1]


def test_records_are_scored_as_they_are_trained_on():
    records = list(TEXTS.split("test"))
    scores = evaluate(llama(), make_tokenizer(), records, progress=False)
    assert scores["data"] == evaluate(llama(), make_tokenizer(), TEXTS, progress=False)[TEXTS.name]
    with pytest.raises(DataError, match="or records only"):
        evaluate(llama(), make_tokenizer(), [TEXTS, *records], progress=False)


def test_what_cannot_be_scored_is_refused():
    tokenizer = make_tokenizer()
    labels = Task("labels", "classification", "accuracy", {"test": [{"text": "one", "label": 3}]})
    with pytest.raises(DataError, match="num_labels"):
        evaluate(bert(3), tokenizer, labels, progress=False)
    with pytest.raises(DataError, match="head"):
        evaluate(bert(2), tokenizer, TEXTS, progress=False)
    with pytest.raises(DataError, match="split"):
        evaluate(llama(), tokenizer, TEXTS, split="train", progress=False)
    with pytest.raises(DataError, match="names of tasks"):
        evaluate(llama(), tokenizer, [TEXTS, TEXTS], progress=False)
    with pytest.raises(DataError, match="limit"):
        evaluate(llama(), tokenizer, TEXTS, limit=0, progress=False)
    with pytest.raises(DataError, match="batch_size"):
        evaluate(llama(), tokenizer, TEXTS, batch_size=0, progress=False)


def test_outputs_are_those_that_are_scored():
    said: dict[str, list[str]] = {}
    sums = [{"prompt": prompt, "answer": "one"} for prompt in PROMPTS]
    choices = [{"prompt": prompt, "choices": ["one", "two plus"], "label": 0} for prompt in PROMPTS]
    pairs = [{"good": "one plus", "bad": "plus plus one"}]
    tasks = [
        Task("sums", "generation", "exact_match", {"test": sums}), Task("pairs", "pairs", "accuracy", {"test": pairs}),
        Task("choices", "choice", "accuracy", {"test": choices}), TEXTS,
    ]  # fmt: skip
    model, tokenizer = llama(), make_tokenizer()
    scores = evaluate(model, tokenizer, tasks, progress=False, on_outputs=said.__setitem__)
    assert [len(said[task.name]) for task in tasks] == [len(PROMPTS), 1, len(PROMPTS), 0]
    assert said["choices"].count("one") / len(PROMPTS) == scores["choices"]["accuracy"]
    assert (said["pairs"] == ["one plus"]) == bool(scores["pairs"]["accuracy"])
    assert sum(text.strip() == "one" for text in said["sums"]) / len(PROMPTS) == scores["sums"]["exact_match"]
    labels = Task(
        "labels", "classification", "accuracy", {"test": [{"text": prompt, "label": 1} for prompt in PROMPTS]}
    )
    scores = evaluate(bert(2), tokenizer, labels, progress=False, on_outputs=said.__setitem__)
    assert said["labels"].count("1") / len(PROMPTS) == scores["labels"]["accuracy"]
