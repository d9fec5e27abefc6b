"""Scores of Dovetail beside those of lm-eval's HFLM, on one model in memory and the same local data.

    pip install 'dovetail[eval]'
    python bench/beside_lm_eval.py MODEL --data ../shared/data --out bench/results/beside_lm_eval.json

MODEL is a folder of a decoder-only model. The data folder has arc_easy/, openbookqa/ and gsm8k/ with train.jsonl and
test.jsonl, and wikitext2_test.txt. Use --dtype bfloat16 for generation on a processor. lm-eval reads YAML tasks, which
this script writes beside the result, with the prompts and metrics of its own tasks of these names. Both use the first
training records as examples. A task whose result is in the file is not scored again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tokenizers.processors import TemplateProcessing

import dovetail
from dovetail.tasks.scoring.harness import evaluate_lm_eval

WINDOW = 256
"""Tokens of a row of text. lm-eval counts the inputs of a window only, which are one less."""
TOKENS = 64
"""Tokens of an answer."""
SHOTS = 1
STOP = ["Question:", "</s>", "<|im_end|>"]

Scores = dict[str, float]


def choices(
    name: str, prompt: str, template: str, data: Path, records: int, model: Any, tokenizer: Any
) -> dict[str, Any]:
    """Multiple choice: acc and acc_norm, and the share of records with the same answer."""
    task = _yaml(name, data / name, output_type="multiple_choice", doc_to_text=template, doc_to_target="answer",
                 doc_to_choice="{{choices}}", metrics=["acc", "acc_norm"])  # fmt: skip
    rows = _lines(data / name / "test.jsonl")[:records]
    made = [
        {"prompt": prompt.format(row["question"]), "choices": [f" {each}" for each in row["choices"]],
         "label": row["answer"]} for row in rows
    ]  # fmt: skip
    own = dovetail.Task(name, "choice", "accuracy", {"test": made})
    ours, said, seconds = _own(model, tokenizer, own, batch_size=16)
    theirs, samples, their_seconds = _theirs(model, tokenizer, task, records, batch_size=16)
    same = sum(one == sample[2] for one, sample in zip(said, samples, strict=True)) / len(said)
    return {
        "n": len(said), "same_answers": same, "seconds": [seconds, their_seconds],
        "scores": {"acc": [ours["accuracy"], theirs["acc"]], "acc_norm": [ours["accuracy_norm"], theirs["acc_norm"]]},
    }  # fmt: skip


def gsm8k(data: Path, records: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Generation with an example: the number after ####, and the last number of the answer."""
    filters = [
        {"name": name, "filter": [{"function": "regex", **how}, {"function": "take_first"}]}
        for name, how in (
            ("strict-match", {"regex_pattern": r"#### (\-?[0-9\.\,]+)"}),
            ("flexible-extract", {"group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}),
        )
    ]
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
             "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}  # fmt: skip
    task = _yaml("gsm8k", data / "gsm8k", output_type="generate_until", doc_to_target="{{answer}}",
                 doc_to_text="Question: {{question}}\nAnswer:", metrics=[exact], filter_list=filters,
                 generation_kwargs={"until": STOP, "do_sample": False, "max_gen_toks": TOKENS})  # fmt: skip
    rows = {split: _lines(data / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    rows = {"train": rows["train"][: SHOTS + 1], "test": rows["test"][:records]}
    made = {
        split: [{"prompt": f"Question: {row['question']}\nAnswer:", "answer": f" {row['answer']}"} for row in found]
        for split, found in rows.items()
    }
    strict = dovetail.Scoring(shots=SHOTS, extract="####", stop=tuple(STOP), max_new_tokens=TOKENS)
    flexible = strict.model_copy(update={"extract": "last_number"})
    own = dovetail.Task("gsm8k", "generation", "exact_match", made, strict)
    ours, said, seconds = _own(model, tokenizer, own, batch_size=10)
    last = [
        flexible.extracted(text) == strict.extracted(record["answer"])
        for text, record in zip(said, made["test"], strict=True)
    ]
    theirs, samples, their_seconds = _theirs(model, tokenizer, task, records, batch_size=10, shots=SHOTS)
    numbers = [strict.extracted(text) for text in said]
    return {
        "n": len(said), "seconds": [seconds, their_seconds], "answered": sum(each is not None for each in numbers),
        "same_answers": sum(flexible.extracted(one) == flexible.extracted(sample[2])
                            for one, sample in zip(said, samples, strict=True)) / len(said),
        "scores": {
            "exact_match, strict-match": [ours["exact_match"], theirs["exact_match, strict-match"]],
            "exact_match, flexible-extract": [sum(last) / len(last), theirs["exact_match, flexible-extract"]],
        },
    }  # fmt: skip


def wikitext(data: Path, records: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Perplexities of long paragraphs in windows of `WINDOW` tokens, without lm-eval's detokenization."""
    lines = (data / "wikitext2_test.txt").read_text(encoding="utf-8").split("\n")
    texts = [line.strip() for line in lines if len(line) > 1000][:records]
    folder = Path(_folder) / "wikitext"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    task = {
        "task": "own_wikitext", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": str((folder / "test.jsonl").absolute())}}, "doc_to_text": "",
        "doc_to_target": "{{page}}", "metric_list": [{"metric": metric} for metric in metrics],
    }  # fmt: skip
    theirs, _, _ = _theirs(model, tokenizer, task, records, batch_size=4, max_length=WINDOW - 1)
    # HFLM puts the begin token before a text that the tokenizer has begun already, and predicts the second one. With
    # its add_bos_token=False, as here, there is one begin token.
    once = copy.deepcopy(tokenizer)
    once.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    begun, _, their_seconds = _theirs(model, once, task, records, batch_size=4, max_length=WINDOW - 1)
    found: dict[str, Any] = {"n": len(texts), "scores": {}}
    ways = [
        ("rolling, one begin token", WINDOW - 1, begun), ("rolling", WINDOW - 1, theirs),
        ("disjoint windows", None, begun), ("stride of 64", 64, begun),
    ]  # fmt: skip
    for name, stride, wanted in ways:
        rules = dovetail.Scoring(stride=stride)
        own = dovetail.Task("wikitext", "text", "perplexity", {"test": [{"text": text} for text in texts]}, rules)
        ours, _, seconds = _own(model, tokenizer, own, batch_size=4, max_length=WINDOW)
        found.setdefault("seconds", [seconds, their_seconds])
        found["scores"] |= {f"{metric}, {name}": [ours[metric], wanted[metric]] for metric in metrics}
    return found


def _own(model: Any, tokenizer: Any, task: dovetail.Task, **settings: Any) -> tuple[Scores, list[str], float]:
    outputs: dict[str, list[str]] = {}
    started = time.perf_counter()
    found = dovetail.evaluate(model, tokenizer, task, on_outputs=outputs.__setitem__, **settings)
    return found[task.name], outputs[task.name], time.perf_counter() - started


def _theirs(
    model: Any, tokenizer: Any, task: dict[str, Any], records: int, **settings: Any
) -> tuple[Scores, list[tuple[str, str, str]], float]:
    folder = Path(_folder) / "tasks" / task["task"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    started = time.perf_counter()
    found, samples = evaluate_lm_eval(model, tokenizer, [task["task"]], include=folder, limit=records, **settings)
    return found[task["task"]], samples[task["task"]], time.perf_counter() - started


def _yaml(name: str, folder: Path, *, metrics: list[Any], **more: Any) -> dict[str, Any]:
    files = {split: str((folder / f"{split}.jsonl").absolute()) for split in ("train", "test")}
    return {
        "task": f"own_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test",
        "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"},
        "metric_list": [
            metric if isinstance(metric, dict) else {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        **more,
    }  # fmt: skip


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    global _folder
    _folder = str(asked.out.with_suffix("")) + "-files"
    done: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    question, named = "Question: {}\nAnswer:", "Question: {{question}}\nAnswer:"
    jobs: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
        "wikitext": lambda *loaded: wikitext(asked.data, asked.texts, *loaded),
        "arc_easy": lambda *loaded: choices("arc_easy", question, named, asked.data, asked.records, *loaded),
        "openbookqa": lambda *loaded: choices("openbookqa", "{}", "{{question}}", asked.data, asked.records, *loaded),
        "gsm8k": lambda *loaded: gsm8k(asked.data, asked.records, *loaded),
    }
    todo = [name for name in jobs if name not in done and (not asked.only or name in asked.only)]
    loaded = dovetail.load(asked.model, dtype=asked.dtype) if todo else None
    for name in todo:
        done[name] = jobs[name](*loaded) | {"dtype": asked.dtype}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(done, indent=2) + "\n")
        print(name, json.dumps(done[name]), flush=True)
    print("| task | score | dovetail | lm-eval | difference |\n|---|---|---:|---:|---:|")
    for name, found in done.items():
        for metric, (ours, theirs) in found["scores"].items():
            print(f"| {name} | {metric} | {ours:.7g} | {theirs:.7g} | {abs(ours - theirs) / abs(theirs or 1):.1e} |")


if __name__ == "__main__":
    main()
