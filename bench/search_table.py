"""The table of assignments behind docs/search.md: which score of a layer tells what a training will give.

    OMP_NUM_THREADS=1 python bench/search_table.py --train [--limit N]   # fills bench/results/search_table.jsonl
    OMP_NUM_THREADS=1 python bench/search_table.py --scores              # scores: bench/results/search_scores.json
    OMP_NUM_THREADS=1 python bench/search_table.py --super               # adds those of a super-adapter to them
    python bench/search_table.py --report                                # prints the table of docs/search.md

The playground on `word_problems`, chain `int(bits=b, group=64) >> lora(r=r)`, with bits of 2, 3, 4, 8 and ranks of 2,
4, 8, 16 for each of 16 units: query+key+value, output, gate+up and down of 4 blocks. 120 assignments are random: one
half draws every gene evenly, each of the other half draws bits with probabilities of its own, so that sizes spread. 40
are structured: uniform ones, ones that rise or fall with depth, and ones where one unit differs.

Each line of the table is one training:

    id, length     number of the assignment, and the key of `LENGTHS`: "full", and all others for 40 held-back ones
    bits, ranks    of each unit, in the order of `units()`
    steps          linear schedule from 10 times LoRA's default rate; the same batches for all
    train_loss     of the last step; validation_loss over all validation records; both in nats per token
    accuracy       fraction of validation records of which every answer token is the most likely one: what greedy
                   decoding gets right
    nbytes, bits_per_weight   exact, of the model with its adapters;  seconds  of processor time

Lines that exist are not trained again, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from dovetail.chains.layer.elastic import groups
from dovetail.chains.notation import chain
from dovetail.checkpoint.footprint import footprint
from dovetail.runs.recipe import Recipe
from dovetail.searches.scores import entropy, gradient_scores
from dovetail.searches.trial import Workbench, copied
from dovetail.tasks.find import load_task
from dovetail.tasks.lengths import in_evaluation
from dovetail.tasks.tokens import IGNORED, Collator, Example, RowMaker
from dovetail.tasks.vocabulary import pad_id, vocabulary_of
from dovetail.training.train import train

RESULTS = Path(__file__).parent / "results"
TABLE, SCORES = RESULTS / "search_table.jsonl", RESULTS / "search_scores.json"
BITS, RANKS = (2, 3, 4, 8), (2, 4, 8, 16)
BLOCKS = 4
ROLES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip
LENGTHS = {"short": (48, 16, 0), "full": (60, 32, 0), "eighth": (8, 32, 0), "again": (60, 32, 1)}
"""Steps, records of a step and seed: 0.4 of the records of a full training, a full one, an eighth of its steps, and a
full one of another seed, which shows how much of a loss is chance."""
STATES = {"untuned": 0, "tuned": 12}
"""Steps of tuning before scores are taken: none, or a fifth of a full training."""
SAMPLES = 128
TASK = "word_problems"
RANDOM, HELD_BACK = 120, 40

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
            "train": {"max_steps": 60, "batch_size": 32, "lr_scale": 10},
            "calibration": {"inputs": "original"}, "merge": "none",
        })  # fmt: skip
        task = load_task(self.recipe.data)
        self.options = [chain(f"int(bits={bits}, group=64)").links for bits in BITS]
        self.bench = Workbench(self.recipe, task, applied={name: self.options for names in units() for name in names})
        model, tokenizer = self.bench.model, self.bench.tokenizer
        make = RowMaker(tokenizer, False, 512, vocabulary_of(model))
        self.rows = make.examples(task.kind, task.split("validation"))
        self.sample = make.examples(task.kind, random.Random(0).sample(task.split("train"), SAMPLES))
        self.collate = Collator(pad_id(tokenizer, vocabulary_of(model)))

    @torch.inference_mode()
    def loss(self, rows: Sequence[Example]) -> tuple[float, float]:
        """Return the loss, in nats per token, and the accuracy of the model as it stands on these rows."""
        loss, tokens, right = 0.0, 0, 0
        with in_evaluation(self.bench.model):
            for at in range(0, len(rows), 64):
                batch = self.collate(rows[at : at + 64])
                labels = batch.pop("labels")[:, 1:]
                logits = self.bench.model(**batch).logits[:, :-1]
                counted = labels != IGNORED
                each = torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
                loss, tokens = loss + each.item(), tokens + int(counted.sum())
                right += int(((logits.argmax(-1) == labels) | ~counted).all(1).sum())
        return loss / tokens, right / len(rows)

    def direct(self, assignment: Assignment) -> float:
        """Return the loss of the mixture on training records, under the adapters that the model has."""
        bench = self.bench
        for names, bits in zip(units(), assignment[0], strict=True):
            for name in names:
                bench.record.layers[name].base = copied(bench.base(name, self.options[BITS.index(bits)]))
        loss, _ = self.loss(self.sample)
        for name, layer in bench.record.layers.items():
            layer.base = bench.base(name, ())
        return loss

    def line(self, number: int, assignment: Assignment, length: str) -> dict[str, Any]:
        started = process_time()
        steps, batch, seed = LENGTHS[length]
        settings = self.recipe.train.model_dump() | {"max_steps": steps, "batch_size": batch}
        with self.bench.candidate(layers(assignment)) as model:
            trained = train(model, self.bench.tokenizer, self.bench.task, seed=seed, progress=False, **settings)
            loss, accuracy = self.loss(self.rows)
            size = footprint(model)
        return {
            "id": number, "length": length, "steps": steps, "bits": assignment[0], "ranks": assignment[1],
            "train_loss": trained.stages[0].losses[-1][1], "validation_loss": loss, "accuracy": accuracy,
            "nbytes": size.nbytes, "bits_per_weight": size.bits_per_weight,
            "seconds": round(process_time() - started, 2),
        }  # fmt: skip


def work() -> list[tuple[int, str]]:
    """All trainings: those of the held-back assignments first, then full ones of the others."""
    back, number = held_back(), len(assignments())
    others = random.Random(3).sample([each for each in range(number) if each not in back], number - len(back))
    known = random.Random(2).sample(back, len(back))
    return [(each, length) for length in LENGTHS for each in known] + [(each, "full") for each in others]


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


# --- Scores ----------------------------------------------------------------------------------------------------------
def take_scores(path: Path) -> None:
    """Write the scores of the untuned model and of tuned ones."""
    table = Table()
    bench = table.bench
    found: dict[str, Any] = {"units": units(), "bits": BITS, "ranks": RANKS, "samples": SAMPLES}
    weights = {name: bench.base(name, ()).matrix() for name in bench.layers}
    found["weight_error"] = {
        name: [
            float((bench.base(name, option).matrix() - weight).square().sum() / weight.square().sum())
            for option in table.options
        ]
        for name, weight in weights.items()
    }  # fmt: skip
    for title, steps in STATES.items():
        started = process_time()
        with bench.tuned(steps) if steps else nullcontext(bench.model):
            tuned = process_time()
            whole = [min(weight.shape) for weight in weights.values()]
            options = dict.fromkeys(bench.layers, table.options)
            scores = gradient_scores(bench, options, [*RANKS, max(whole)], SAMPLES)
            gradient = process_time()
            found[title] = {
                "steps": steps,
                "fisher": {name: [scores.fisher[name, option] for option in table.options] for name in bench.layers},
                "energy": scores.energy,
                "entropy": entropy(bench, SAMPLES),
                "seconds": {
                    "tuning": tuned - started, "gradient": gradient - tuned, "entropy": process_time() - gradient,
                },
                "direct": {number: table.direct(assignments()[number]) for number in held_back()},
            }  # fmt: skip
        print(title, found[title]["seconds"], flush=True)
    with bench.candidate(layers(((BITS[-1],) * len(units()), (RANKS[-1],) * len(units())))):
        found["entropy_quantized"] = entropy(bench, SAMPLES)
    path.write_text(json.dumps(found) + "\n")


def take_super(path: Path, steps: Sequence[int] = (60, 240)) -> None:
    """Add the loss of each held-back mixture under a super-adapter: a training whose steps draw all bits and ranks.

    Of three steps in turn, one has the largest bits and ranks, one the smallest and one draws them for each unit.
    """
    table, found = Table(), json.loads(path.read_text())
    bench, least, largest = table.bench, (BITS[0], RANKS[0]), (BITS[-1], RANKS[-1])
    elastic_chain = f"int(bits={BITS[-1]}, group=64) >> lora(r={RANKS[-1]}, elastic={sorted(RANKS, reverse=True)})"

    def put(assignment: Assignment) -> None:
        rank_of = {}
        for names, bits, rank in zip(units(), *assignment, strict=True):
            for name in names:
                bench.record.layers[name].base = copied(bench.base(name, table.options[BITS.index(bits)]))
                rank_of[name] = rank
        for group in groups(bench.model):
            group.use_rank(rank_of[group.name.partition("/")[0].partition("+")[0]])

    for asked in steps:
        draw, step, started = random.Random(4), 0, process_time()

        def before(module: nn.Module, args: Any, draw: random.Random = draw) -> None:
            nonlocal step
            if module.training:
                count = len(units())
                drawn = [(draw.choice(BITS), draw.choice(RANKS)) for _ in range(count)]
                genes = ([largest] * count, [least] * count, drawn)[step % 3]
                put((tuple(bits for bits, _ in genes), tuple(rank for _, rank in genes)))
                step += 1

        settings = table.recipe.train.model_dump() | {"max_steps": asked}
        with bench.candidate(dict.fromkeys(bench.layers, elastic_chain)) as model:
            handle = model.register_forward_pre_hook(before)
            train(model, bench.tokenizer, bench.task, seed=0, progress=False, **settings)
            handle.remove()
            assert step == asked
            trained = process_time()
            losses = {}
            for number in held_back():
                put(assignments()[number])
                losses[number] = table.loss(table.sample)[0]
        found.setdefault("super", {})[str(asked)] = losses
        print(f"super-adapter, {asked} steps: {trained - started:.0f} s, scores {process_time() - trained:.0f} s")
    path.write_text(json.dumps(found) + "\n")


# --- Correlations ----------------------------------------------------------------------------------------------------
def predictions(rows: Sequence[dict[str, Any]], scores: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return predictor -> its value for each row, larger where the loss should be larger."""
    error, quantized = scores["weight_error"], _from_least(scores["entropy_quantized"])
    least = {"bits": (BITS[0],) * len(units()), "ranks": (RANKS[0],) * len(units())}

    def total(value: Callable[[str, int, int], float]) -> np.ndarray:
        """Sum over the layers, relative to the least bits and ranks; `value` takes a layer, and places in both."""
        sums = np.array([
            sum(
                value(name, BITS.index(bits), RANKS.index(rank))
                for names, bits, rank in zip(units(), row["bits"], row["ranks"], strict=True)
                for name in names
            )
            for row in (*rows, least)
        ])  # fmt: skip
        return sums[:-1] / sums[-1]

    fewer = total(lambda name, bits, rank: 1 - RANKS[rank] / RANKS[-1])
    worse = total(lambda name, bits, rank: error[name][bits])
    found = {
        "bytes": -np.array([row["nbytes"] for row in rows], float),
        "bits per weight": -np.array([row["bits_per_weight"] for row in rows]),
        "ranks": fewer,
        "weight error, bits": worse,
        "weight error and ranks": (worse + fewer) / 2,
    }
    less = total(lambda name, bits, rank: quantized[name] * (1 - RANKS[rank] / RANKS[-1]))
    for state in STATES:
        one = scores[state]
        information = total(_weighted(error, _from_least(one["entropy"])))
        fisher = total(lambda name, bits, rank, one=one: one["fisher"][name][bits])
        energy = total(lambda name, bits, rank, one=one: one["energy"][name][-2] - one["energy"][name][rank])
        found |= {
            f"entropy, bits, {state}": information,
            f"entropy, bits and ranks, {state}": (information + less) / 2,
            f"gradient norm, bits, {state}": total(
                _weighted(error, {name: values[-1] ** 0.5 for name, values in one["energy"].items()})
            ),
            f"Fisher, bits, {state}": fisher,
            f"energy, ranks, {state}": energy,
            f"Fisher and energy, {state}": (fisher + energy) / 2,
            f"weight error and energy, {state}": (worse + energy) / 2,
            f"direct, {state}": np.array([one["direct"][str(row["id"])] for row in rows]),
        }
    return found


def _weighted(error: dict[str, list[float]], weight: dict[str, float]) -> Callable[[str, int, int], float]:
    return lambda name, bits, rank: weight[name] * error[name][bits]


def _from_least(values: dict[str, float]) -> dict[str, float]:
    """Return the values counted from the least, as `start: entropy` takes them."""
    return {name: value - min(values.values()) for name, value in values.items()}


def spearman(x: np.ndarray, y: np.ndarray, given: Sequence[np.ndarray] = ()) -> float:
    """Return the rank correlation of x and y, or their partial one at equal values of others."""
    ranked = [rankdata(each) for each in (x, y)]
    if given:
        known = np.column_stack([np.ones(len(x)), *map(rankdata, given)])
        ranked = [each - known @ np.linalg.lstsq(known, each, rcond=None)[0] for each in ranked]
    return float(np.corrcoef(*ranked)[0, 1])


def interval(x: np.ndarray, y: np.ndarray, given: Sequence[np.ndarray] = ()) -> tuple[float, float, float]:
    """Return the correlation and its 95 % interval over 2,000 bootstrap samples of the assignments."""
    draw = np.random.default_rng(0)
    values = []
    for _ in range(2000):
        at = draw.integers(len(x), size=len(x))
        values.append(spearman(x[at], y[at], [each[at] for each in given]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return spearman(x, y, given), float(low), float(high)


def report(path: Path, scores: Path) -> str:
    """Return the table of docs/search.md."""
    by_length: dict[str, dict[int, dict[str, Any]]] = {length: {} for length in LENGTHS}
    for row in read(path):
        by_length[row["length"]][row["id"]] = row
    full = {number: row for number, row in by_length["full"].items() if number in held_back()}
    rows = list(full.values())
    loss = np.array([row["validation_loss"] for row in rows])
    wrong = 1 - np.array([row["accuracy"] for row in rows])
    found = predictions(rows, json.loads(scores.read_text()))
    for steps, losses in json.loads(scores.read_text()).get("super", {}).items():
        name = f"super-adapter, {steps} steps"
        found[name] = np.array([losses.get(str(row["id"]), math.nan) for row in rows])
    titles = {
        "eighth": "training of 1/8 length",
        "short": "training on 0.4 of the records",
        "again": "training with another seed",
    }
    for length, title in titles.items():
        known = by_length[length]
        found[title] = np.array([known[number]["validation_loss"] if number in known else math.nan for number in full])
    size = found["bytes"]
    again = np.array([by_length["again"].get(number, {}).get("validation_loss", math.nan) for number in full])
    both = (loss + again) / 2
    lines = [
        f"{len(rows)} assignments; loss {loss.min():.3f} to {loss.max():.3f}, accuracy {1 - wrong.max():.3f} to "
        f"{1 - wrong.min():.3f}, rank correlation of loss and accuracy {-spearman(loss, wrong):+.2f}; "
        f"{np.isfinite(both).sum()} with two seeds",
        "",
        "| predictor | loss | accuracy | loss at equal bytes | mean loss of two seeds | the same at equal bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, values in found.items():
        cells = [_cell(values, target, given) for target, given in (
            (loss, []), (wrong, []), (loss, [size]), (both, []), (both, [size])
        ) if not (given and values is size)]  # fmt: skip
        if values is size:
            cells = [*cells[:2], "", cells[2], ""]
        if name in titles.values():  # the loss of the table's seed is part of the mean
            cells[3:] = ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(x: np.ndarray, y: np.ndarray, given: Sequence[np.ndarray]) -> str:
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 10:
        return ""
    value, low, high = interval(x[known], y[known], [each[known] for each in given])
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def read(path: Path = TABLE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train what the table does not have yet")
    parser.add_argument("--scores", action="store_true", help="take the scores of layers")
    parser.add_argument("--super", action="store_true", help="train super-adapters, and take their scores")
    parser.add_argument("--report", action="store_true", help="print the correlations")
    parser.add_argument("--limit", type=int, help="train at most so many")
    parser.add_argument("--table", type=Path, default=TABLE)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.train:
        fill(asked.limit, asked.table)
    if asked.scores:
        take_scores(SCORES)
    if asked.super:
        take_super(SCORES)
    if asked.report:
        print(report(asked.table, SCORES))


if __name__ == "__main__":
    main()
