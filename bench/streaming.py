"""Reading and tokenizing many records: time and memory beside `datasets.map` with the bare tokenizer.

    python bench/streaming.py [--records 1000000] [--kind text,chat] [--model playground] [--json]

The records are made on the fly: random words, 200 tokens each, in one JSON Lines file. Each way runs in a process of
its own. "datasets" loads the file and maps the tokenizer alone over it, in batches, to input_ids on disk. "dovetail"
reads and checks the records (`load_data`) and makes rows with labels of them. Memory is the peak of the resident set of
the process, beyond that before the file is read. Times are processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
TEXT = """the sailor has seven plums and the baker finds four apples then a farmer drops some eggs near old ships
while every teacher counts how many pears are left over there today"""
WORDS = TEXT.split()


def text_of(random: Random, words: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(words))


def make(path: Path, kind: str, records: int, words: int) -> None:
    random = Random(0)
    with path.open("w") as file:
        for _ in range(records):
            if kind == "text":
                record: dict[str, Any] = {"text": text_of(random, words)}
            else:
                record = {"instruction": text_of(random, words // 4), "output": text_of(random, words - words // 4)}
            file.write(json.dumps(record) + "\n")


def peak_nbytes() -> int:
    """Return the highest resident set so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tokenizer_of(model: str) -> Any:
    from dovetail.checkpoint.config import load_tokenizer

    return load_tokenizer(model)


def with_datasets(path: Path, kind: str, model: str) -> dict[str, float]:
    import datasets

    tokenizer = tokenizer_of(model)
    before, start = peak_nbytes(), time.process_time()
    with tempfile.TemporaryDirectory() as cache:
        data: Any = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        read = time.process_time()

        def tokenize(batch: dict[str, list[str]]) -> Any:
            texts = [" ".join(parts) for parts in zip(*batch.values(), strict=True)]
            return {"input_ids": tokenizer(texts)["input_ids"]}

        rows = data.map(tokenize, batched=True, remove_columns=data.column_names)
        stop = time.process_time()
        return {
            "rows": len(rows), "tokens": len(rows[0]["input_ids"]), "read_seconds": read - start,
            "tokenize_seconds": stop - read, "memory_nbytes": peak_nbytes() - before,
        }  # fmt: skip


def with_dovetail(path: Path, kind: str, model: str) -> dict[str, float]:
    from dovetail.tasks.find import load_data
    from dovetail.tasks.tokens import RowMaker

    tokenizer = tokenizer_of(model)
    before, start = peak_nbytes(), time.process_time()
    task = load_data(path)
    read = time.process_time()
    rows = RowMaker(tokenizer, encoder_decoder=False, max_length=512).rows(task.kind, task.split("train"))
    stop = time.process_time()
    return {
        "rows": len(rows), "tokens": len(rows[0]["input_ids"]), "read_seconds": read - start,
        "tokenize_seconds": stop - read, "memory_nbytes": peak_nbytes() - before,
    }  # fmt: skip


WAYS = {"datasets": with_datasets, "dovetail": with_dovetail}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=107)
    parser.add_argument("--kind", default="text,chat")
    parser.add_argument("--model", default="playground")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=3, metavar=("WAY", "FILE", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        way, file, kind = arguments.run
        print(json.dumps(WAYS[way](Path(file), kind, arguments.model)))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kind.split(","):
            path = Path(folder) / f"{kind}.jsonl"
            make(path, kind, arguments.records, arguments.words)
            for way in WAYS:
                command = [sys.executable, __file__, "--model", arguments.model, "--run", way, str(path), kind]
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[f"{way}, {kind}"] = json.loads(said.splitlines()[-1])
                if not arguments.json:
                    row = found[f"{way}, {kind}"]
                    seconds = f"read {row['read_seconds']:.0f} s, tokenize {row['tokenize_seconds']:.0f} s"
                    memory = f"memory {row['memory_nbytes'] / 1e9:.2f} GB"
                    print(
                        f"{way:8} {kind:4} {row['rows']} rows of {row['tokens']} tokens: {seconds}, {memory}",
                        flush=True,
                    )
            path.unlink()
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
