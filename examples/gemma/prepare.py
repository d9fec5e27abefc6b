"""Write the records that the recipes of this folder read, from public data sets as JSON Lines and text.

    python examples/gemma/prepare.py DATA [OUTPUT]

DATA     a folder with mawps/, gsm8k/, arc_easy/, openbookqa/ (train.jsonl and test.jsonl) and wikitext2_valid.txt,
         wikitext2_test.txt
OUTPUT   examples/gemma/data by default

mawps, gsm8k           generation: the question as a turn of Gemma's chat format, the final number as the answer
arc_easy, openbookqa   choice: "Question: ... Answer:" and a choice with a space before it
wikitext2              text: paragraphs of at least 300 characters; trained on those of the validation file
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPLITS = ("train", "test")
PARAGRAPH = 300


def turns(question: str) -> str:
    """Return a question in Gemma's chat format, up to where the model answers."""
    return f"<start_of_turn>user\n{question.strip()}<end_of_turn>\n<start_of_turn>model\n"


def number(answer: float | str) -> str:
    """Return a number without a fraction of zero."""
    value = float(str(answer).replace(",", ""))
    return str(int(value)) if value.is_integer() else f"{value:.6g}"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file."""
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines() also cuts at U+2028 inside a text
        if line:
            yield json.loads(line)


def records(data: Path, name: str, split: str) -> list[dict[str, Any]]:
    """Return the records of one split of a data set."""
    if name == "wikitext2":
        text = (data / f"wikitext2_{'valid' if split == 'train' else 'test'}.txt").read_text(encoding="utf-8")
        return [{"text": line.strip()} for line in text.splitlines() if len(line) >= PARAGRAPH]
    found = rows(data / name / f"{split}.jsonl")
    if name == "mawps":
        return [{"prompt": turns(row["question"]), "answer": number(row["answer"])} for row in found]
    if name == "gsm8k":
        return [{"prompt": turns(row["question"]), "answer": row["answer"].split("####")[1].strip()} for row in found]
    return [
        {
            "prompt": f"Question: {row['question'].strip()}\nAnswer:",
            "choices": [f" {choice}" for choice in row["choices"]],
            "label": row["answer"],
        }
        for row in found
    ]


def write(data: Path, output: Path) -> None:
    """Write all data sets."""
    for name in ("mawps", "gsm8k", "arc_easy", "openbookqa", "wikitext2"):
        (output / name).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            lines = [json.dumps(record) + "\n" for record in records(data, name, split)]
            (output / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "data")
