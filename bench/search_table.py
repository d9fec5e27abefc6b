"""The table of assignments behind docs/search.md: which score of a layer tells what a training will give.

    OMP_NUM_THREADS=1 python bench/search_table.py --train [--limit N]   # fills bench/results/search_table.jsonl
    OMP_NUM_THREADS=1 python bench/search_table.py --scores              # scores: bench/results/search_scores.json
    python bench/search_table.py --report                                # prints the table of docs/search.md

The playground on `word_problems`, chain `int(bits=b, group=64) >> lora(r=r)`, with bits of 2, 3, 4, 8 and ranks of 2,
4, 8, 16 for each of 16 units: query+key+value, output, gate+up and down of 4 blocks. 120 assignments are random: one
half draws every gene evenly, each of the other half draws bits with probabilities of its own, so that sizes spread. 40
are structured: uniform ones, ones that rise or fall with depth, and ones where one unit differs.

Each line of the table is one training:

    id, length     number of the assignment; "short", "full" (every eighth assignment) or "eighth" (the held-back ones)
    bits, ranks    of each unit, in the order of `units()`
    steps          of 16 records, linear schedule from 10 times LoRA's default rate, seed 0, the same batches for all
    train_loss     of the last step; validation_loss over all validation records; both in nats per token
    accuracy       fraction of validation records of which every answer token is the most likely one: what greedy
                   decoding gets right
    nbytes, bits_per_weight   exact, of the model with its adapters;  seconds  of processor time

Lines that exist are not trained again, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch

from dovetail.chains.notation import chain
from dovetail.checkpoint.footprint import footprint
from dovetail.runs.recipe import Recipe
from dovetail.searches.trial import Workbench
from dovetail.tasks.find import load_task
from dovetail.tasks.lengths import in_evaluation
from dovetail.tasks.tokens import IGNORED, Collator, RowMaker, pad_id, vocabulary_of
from dovetail.training.train import train

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "search_table.jsonl"
BITS, RANKS = (2, 3, 4, 8), (2, 4, 8, 16)
BLOCKS = 4
ROLES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip
STEPS = {"short": 48, "full": 144, "eighth": 6}
BATCH = 16
TASK = "word_problems"
RANDOM, HELD_BACK, FULL = 120, 40, 20

Assignment = tuple[tuple[int, ...], tuple[int, ...]]


def units() -> list[tuple[str, ...]]:
    """The layers of each unit."""
    return [
        tuple(f"model.layers.{block}.{name}" for name in names) for block in range(BLOCKS) for names in ROLES.values()
    ]


# --- The assignments -------------------------------------------------------------------------------------------------
def assignments() -> list[Assignment]:
    """All assignments: 120 random ones, then 40 structured ones."""
    draw, count = random.Random(0), len(units())
    found: list[Assignment] = []
    for number in range(RANDOM):
        weights = [1.0] * 4 if number % 2 else [draw.expovariate(1) for _ in BITS]
        found.append((tuple(draw.choices(BITS, weights, k=count)), tuple(draw.choices(RANKS, k=count))))
    return found + structured(count)


def structured(count: int) -> list[Assignment]:
    same = [((bits,) * count, (rank,) * count) for bits in BITS for rank in (4, 16)]
    depth = [place // len(ROLES) for place in range(count)]
    monotone = []
    for levels in ((2, 3, 4, 8), (2, 2, 4, 4), (4, 4, 8, 8), (2, 2, 2, 8)):
        for order in (levels, levels[::-1]):
            monotone.append((tuple(order[block] for block in depth), (8,) * count))
    low = [(tuple(2 if place == at else 4 for place in range(count)), (8,) * count) for at in range(count)]
    high = [(tuple(8 if place == at else 2 for place in range(count)), (8,) * count) for at in range(0, count, 2)]
    return same + monotone + low + high


def held_back() -> list[int]:
    """The assignments that the correlations are taken on; the additive model is fitted to the others."""
    return sorted(random.Random(1).sample(range(len(assignments())), HELD_BACK))


def full() -> list[int]:
    """The assignments that are also trained at full length."""
    return sorted(random.Random(2).sample(held_back(), FULL))


def layers(assignment: Assignment) -> dict[str, str]:
    """The assignment as a recipe's `layers`."""
    return {
        name: f"int(bits={bits}, group=64) >> lora(r={rank})"
        for names, bits, rank in zip(units(), *assignment, strict=True)
        for name in names
    }


# --- Training --------------------------------------------------------------------------------------------------------
class Table:
    """The workbench, the validation records, and what one training gives."""

    def __init__(self) -> None:
        self.recipe = Recipe.parse({
            "model": "playground", "chain": "int(bits=4, group=64) >> lora(r=8)", "data": {"task": TASK},
            "train": {"max_steps": STEPS["short"], "batch_size": BATCH, "lr_scale": 10},
            "calibration": {"inputs": "original"}, "merge": "none",
        })  # fmt: skip
        task = load_task(self.recipe.data)
        options = [chain(f"int(bits={bits}, group=64)").links for bits in BITS]
        self.bench = Workbench(self.recipe, task, applied={name: options for names in units() for name in names})
        model, tokenizer = self.bench.model, self.bench.tokenizer
        records = task.split("validation")
        self.rows = RowMaker(tokenizer, False, 512, vocabulary_of(model)).examples(task.kind, records)
        self.collate = Collator(pad_id(tokenizer, vocabulary_of(model)))

    @torch.inference_mode()
    def validate(self) -> tuple[float, float]:
        """Return the loss, in nats per token, and the accuracy of the model as it stands."""
        loss, tokens, right = 0.0, 0, 0
        with in_evaluation(self.bench.model):
            for at in range(0, len(self.rows), 64):
                batch = self.collate(self.rows[at : at + 64])
                labels = batch.pop("labels")[:, 1:]
                logits = self.bench.model(**batch).logits[:, :-1]
                counted = labels != IGNORED
                each = torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
                loss, tokens = loss + each.item(), tokens + int(counted.sum())
                right += int(((logits.argmax(-1) == labels) | ~counted).all(1).sum())
        return loss / tokens, right / len(self.rows)

    def line(self, number: int, assignment: Assignment, length: str) -> dict[str, Any]:
        started = process_time()
        settings = self.recipe.train.model_dump() | {"max_steps": STEPS[length]}
        with self.bench.candidate(layers(assignment)) as model:
            trained = train(model, self.bench.tokenizer, self.bench.task, seed=0, progress=False, **settings)
            loss, accuracy = self.validate()
            size = footprint(model)
        return {
            "id": number, "length": length, "steps": STEPS[length], "bits": assignment[0], "ranks": assignment[1],
            "train_loss": trained.stages[0].losses[-1][1], "validation_loss": loss, "accuracy": accuracy,
            "nbytes": size.nbytes, "bits_per_weight": size.bits_per_weight,
            "seconds": round(process_time() - started, 2),
        }  # fmt: skip


def work() -> list[tuple[int, str]]:
    """All trainings: the held-back assignments first, then the others."""
    back, number = held_back(), len(assignments())
    others = random.Random(3).sample([each for each in range(number) if each not in back], number - len(back))
    short = [(each, "short") for each in (*back, *others)]
    return [*short[:100], *((each, "eighth") for each in back), *((each, "full") for each in full()), *short[100:]]


def fill(limit: int | None, path: Path) -> None:
    """Train what the table does not have yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["id"], row["length"]) for row in read(path)}
    todo = [each for each in work() if each not in done][:limit]
    table, every = Table(), assignments()
    for number, length in todo:
        row = table.line(number, every[number], length)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number} {length}: loss {row['validation_loss']:.4f}, accuracy {row['accuracy']:.3f},", end=" ")
        print(f"{row['nbytes']} bytes, {row['seconds']} s", flush=True)


def read(path: Path = TABLE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train what the table does not have yet")
    parser.add_argument("--limit", type=int, help="train at most so many")
    parser.add_argument("--table", type=Path, default=TABLE)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.train:
        fill(asked.limit, asked.table)


if __name__ == "__main__":
    main()
