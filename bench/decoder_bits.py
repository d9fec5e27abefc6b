"""Bits alone for a real decoder: an exact knapsack on scores beside uniform bits, by perplexity on WikiText-2.

    python bench/decoder_bits.py MODEL OUTPUT [--paragraphs 12] [--scored 16] [--fisher]

MODEL is a folder with a decoder, such as Gemma 3 270M saved from its GGUF file (DESIGN.md, real models); its own values
are the row "as loaded". The scores are the relative errors of the weights, which need no data, and with `--fisher` also
Fisher scores, from paragraphs of WikiText-2's validation file, one forward and one backward pass. Each budget is one
solution of the same knapsack. Perplexity is over the longest paragraphs of the test file, cut to 256
tokens, which is more than over whole texts. Rows that OUTPUT holds are not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from time import process_time, time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

from dovetail.chains.notation import chain
from dovetail.checkpoint.footprint import footprint
from dovetail.runs.recipe import Recipe
from dovetail.searches.knapsack import Knapsack
from dovetail.searches.scores import gradient_scores, weight_errors
from dovetail.searches.trial import Workbench
from dovetail.searches.units import units
from dovetail.tasks.task import Task

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
BITS, BUDGETS = (2, 3, 4, 8), (3.5, 4.0, 4.5)


def paragraphs(name: str, count: int) -> list[dict[str, str]]:
    lines = [line.strip() for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    return [{"text": text} for text in sorted(lines, key=len, reverse=True)[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--paragraphs", type=int, default=12)
    parser.add_argument("--scored", type=int, default=16)
    parser.add_argument("--fisher", action="store_true", help="Fisher scores, too")
    asked = parser.parse_args()
    rows: dict[str, Any] = json.loads(asked.output.read_text()) if asked.output.is_file() else {}
    task = Task("wikitext", "text", "perplexity", {
        "train": paragraphs("wikitext2_valid.txt", asked.scored),
        "validation": paragraphs("wikitext2_test.txt", asked.paragraphs),
    })  # fmt: skip

    def text(bits: int) -> str:
        return f"int(bits={bits}, group=64)"

    def bench_of(common: str, choices: list[Any] | None) -> Workbench:
        recipe = Recipe.parse({
            "model": asked.model, "chain": common, "data": "word_problems",
            "train": {"max_length": 256, "batch_size": 1}, "evaluate": {"batch_size": 4},
        })  # fmt: skip
        bench = Workbench(recipe, task)
        return bench if choices is None else Workbench(recipe, task, applied=dict.fromkeys(bench.layers, choices))

    def keep(name: str, perplexity: float, **more: Any) -> None:
        rows[name] = {"perplexity": perplexity, **more}
        asked.output.write_text(json.dumps(rows, indent=1))
        print(name, rows[name], flush=True)

    bench = bench_of(text(4), [chain(text(bits)).links for bits in BITS])
    if "as loaded" not in rows:
        with bench.tuned(1):
            keep("as loaded", bench.score())
    for bits in (3, 4):
        if (name := f"uniform {bits}") not in rows:
            found = bench.trial(dict.fromkeys(bench.layers, text(bits)))
            keep(name, found.score, bits_per_weight=found.footprint.bits_per_weight)
    choices = [chain(text(bits)).links for bits in BITS]
    options = dict.fromkeys(bench.layers, choices)
    makers: dict[str, Callable[[Workbench], dict[Any, float]]] = {"error": lambda made: weight_errors(made, options)}
    if asked.fisher:
        makers["fisher"] = lambda made: gradient_scores(made, options, [1], asked.scored).fisher
    groups = units(bench.model, bench.targets, "fused")
    costs = [
        [sum(8 * bench.base(name, each).quantized.nbytes for name in unit.layers) for each in choices]
        for unit in groups
    ]
    weights = sum(bench.base(name, ()).dense.numel() for name in bench.layers)
    for title, make in makers.items():
        if all(f"{title}, budget {budget}" in rows for budget in BUDGETS):
            continue
        began, seconds = time(), process_time()
        found = make(bench)
        knapsack = Knapsack([[sum(found[name, e] for name in u.layers) for e in choices] for u in groups], costs)
        solved = {budget: knapsack.solve(budget * weights) for budget in BUDGETS}
        cost = {"seconds": time() - began, "cpu_seconds": process_time() - seconds}
        for budget, chosen in solved.items():
            layers = {name: text(BITS[at]) for unit, at in zip(groups, chosen, strict=True) for name in unit.layers}
            trial = bench.trial(layers)
            keep(f"{title}, budget {budget}", trial.score, bits_per_weight=trial.footprint.bits_per_weight,
                 bits=[BITS[at] for at in chosen], scoring=cost)  # fmt: skip
    del bench
    for name in ("nf4", "nf4(double=true)"):
        if name not in rows:
            other = bench_of(name, None)
            with other.candidate({}):
                size = footprint(other.model).bits_per_weight
            keep(name, other.trial({}).score, bits_per_weight=size)


if __name__ == "__main__":
    main()
