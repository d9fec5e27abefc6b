"""Experts on the playground: what compressing and merging costs in quality (ComPEFT Tables 4 and 6, Figures 5 and 6).

    OMP_NUM_THREADS=1 python bench/experts_quality.py --output DIR [--seeds 0 1 2]

For each seed, four adapters are trained (examples/experts/), each is compressed with the density and alpha that win on
the validation split, and merged with the others; the factor of a merge is chosen on the validation splits too. Figures
are of the test splits, in points: exact match and accuracy in percent, and of the perplexity task 100 exp(-nats a
token), the mean likelihood of a token in percent. What is done already is taken from DIR.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from peft.utils import merge_utils
from torch import Tensor

import dovetail
from dovetail import experts
from dovetail.experts import baselines
from dovetail.tasks import playground

EXAMPLES = Path(__file__).parents[1] / "examples" / "experts"
TASKS = ("word_problems", "multiple_choice", "acceptability", "perplexity")
DENSITIES, GRID = (0.05, 0.1, 0.2), (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1, 1.5, 2, 2.5, 2.75, 3, 3.25, 3.5, 4, 5, 6, 8, 10)
FACTORS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)
TRIM, DROP = 0.2, 0.5
"""Shares that TIES and DARE keep."""


class Playground:
    """A model that any of the experts can be put on."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.model, self.tokenizer = dovetail.load("playground")
        self.base = {task: self.score(task, "test") for task in TASKS}
        self.vectors = {task: experts.task_vector(folder / task / "adapter", self.model) for task in TASKS}
        dovetail.apply(self.model, self.vectors[TASKS[0]].origin.chain or "", seed=seed)

    def score(self, task: str, split: str) -> float:
        """Points of the model as it is."""
        found = dovetail.evaluate(self.model, self.tokenizer, task, split=split, progress=False)[task]
        if "nats_per_token" in found:
            return 100 * math.exp(-found["nats_per_token"])
        return 100 * found.get("exact_match", found.get("accuracy", 0.0))

    def of(self, vector: Mapping[str, Tensor], tasks: Sequence[str], split: str = "test") -> dict[str, float]:
        """Points with a task vector."""
        experts.put(self.model, vector, self.vectors[TASKS[0]].origin)
        found = {task: self.score(task, split) for task in tasks}
        experts.deactivate(self.model)
        return found


def train(folder: Path, seed: int) -> None:
    for task in TASKS:
        if not (folder / task / "report.json").is_file():
            recipe: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{task}.yaml").read_text())
            dovetail.run(recipe | {"seed": seed}, output=folder / task)


def compressed(place: Playground, folder: Path) -> tuple[dict[str, Any], dict[str, experts.Expert]]:
    """Each expert alone, beside the baselines at its density."""
    rows: dict[str, Any] = {}
    chosen: dict[str, experts.Expert] = {}
    for task in TASKS:
        vector = place.vectors[task]
        scorer = experts.scorer(place.model, place.tokenizer, task)
        found = experts.sweep(vector, scorer, densities=DENSITIES, alphas=ALPHAS)
        expert = chosen[task] = found.expert
        density = expert.density
        expert.save(folder / f"{task}.dvt")
        others: dict[str, Any] = {
            "STC": baselines.stc(vector, density),
            "pruned": baselines.prune(vector, density),
            "DARE": baselines.dare(vector, density, seed=0),
            "BitDelta": baselines.bitdelta(vector),
        }
        records = playground.task(task).split("train")[:256]
        others["BitDelta, trained scales"] = baselines.train_scales(
            others["BitDelta"], place.model, place.tokenizer, vector, records
        )
        plain = sum(tensor.numel() * 2 for tensor in vector.values())
        rows[task] = {
            "base": {"score": place.base[task]},
            "uncompressed": {"score": place.of(vector, [task])[task], "nbytes": plain},
            "ComPEFT": {"score": place.of(expert.dense(), [task])[task], "nbytes": expert.nbytes, "density": density,
                        "alpha": expert.alpha},
        }  # fmt: skip
        for name, other in others.items():
            rows[task][name] = {"score": place.of(other.dense(), [task])[task], "nbytes": other.nbytes}
        print(task, json.dumps(rows[task]), flush=True)
    return rows, chosen


def merged(place: Playground, chosen: Mapping[str, experts.Expert]) -> dict[str, Any]:
    """All four in one, from uncompressed task vectors by peft's functions and from experts on their masks."""
    vectors, packed = [place.vectors[task] for task in TASKS], [chosen[task] for task in TASKS]

    def dense(function: Callable[..., Tensor], **settings: Any) -> Callable[[float], dict[str, Tensor]]:
        def at(factor: float) -> dict[str, Tensor]:
            torch.manual_seed(0)
            weights = torch.full((len(vectors),), factor)
            return {name: function([v[name] for v in vectors], weights, **settings) for name in sorted(vectors[0])}

        return at

    def coded(method: str, density: float | None = None) -> Callable[[float], Mapping[str, Tensor]]:
        return lambda factor: experts.merge(packed, method, weights=[factor] * len(packed), density=density)

    ways = {
        "average": (dense(merge_utils.task_arithmetic), coded("task_arithmetic"), (1 / len(TASKS),)),
        "task arithmetic": (dense(merge_utils.task_arithmetic), coded("task_arithmetic"), FACTORS),
        "TIES": (dense(merge_utils.ties, density=TRIM), coded("ties"), FACTORS),
        "DARE": (dense(merge_utils.dare_linear, density=DROP), coded("dare", DROP), FACTORS),
    }
    rows: dict[str, Any] = {}
    for name, (uncompressed, compressed_, factors) in ways.items():
        rows[name] = {}
        for kind, make in (("uncompressed", uncompressed), ("ComPEFT", compressed_)):
            scores = {f: mean(place.of(make(f), TASKS, "validation").values()) for f in factors}
            best = max(scores, key=lambda f: scores[f])
            rows[name][kind] = {"factor": best, **place.of(make(best), TASKS)}
        print(name, json.dumps(rows[name]), flush=True)
    return rows


def grid(place: Playground, folder: Path) -> None:
    """Figure 6: mean validation points of the tasks over the paper's whole grid, no point given up."""
    swept = []
    for task in TASKS:
        scorer = experts.scorer(place.model, place.tokenizer, task)
        swept.append(experts.sweep(place.vectors[task], scorer, densities=GRID, alphas=ALPHAS, certainty=1.0))
    points = []
    for same in zip(*(each.points for each in swept), strict=True):
        scores = [100 * (math.exp(p.score) if p.score < 0 else p.score) for p in same]
        points.append(replace(same[0], score=mean(scores)))
    best = max(points, key=lambda point: point.score)
    whole = mean(place.of(place.vectors[task], [task], "validation")[task] for task in TASKS)
    average = experts.Sweep(tuple(points), best, swept[0].expert, "points, mean of four tasks")
    average.plot(folder / "alpha_density.png", original=whole)
    rows = [{"density": p.density, "alpha": p.alpha, "points": p.score} for p in points]
    (folder / "alpha_density.json").write_text(json.dumps({"uncompressed": whole, "points": rows}, indent=1))


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, and standard deviations of the averages."""

    def said(values: Sequence[float]) -> str:
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        return f"{mean(values):.1f}{spread}"

    lines = ["| one expert | " + " | ".join(TASKS) + " | mean | kB |", "|---|" + "---:|" * (len(TASKS) + 2)]
    for row in results[0]["alone"][TASKS[0]]:
        cells = [said([r["alone"][task][row]["score"] for r in results]) for task in TASKS]
        means = [mean(r["alone"][task][row]["score"] for task in TASKS) for r in results]
        sizes = [r["alone"][task][row].get("nbytes", 0) / 1000 for r in results for task in TASKS]
        lines.append(f"| {row} | {' | '.join(cells)} | {said(means)} | {mean(sizes):.0f} |")
    lines += ["", "| four in one | " + " | ".join(TASKS) + " | mean |", "|---|" + "---:|" * (len(TASKS) + 1)]
    for method in results[0]["merged"]:
        for kind in ("uncompressed", "ComPEFT"):
            cells = [said([r["merged"][method][kind][task] for r in results]) for task in TASKS]
            means = [mean(r["merged"][method][kind][task] for task in TASKS) for r in results]
            lines.append(f"| {method}, {kind} | {' | '.join(cells)} | {said(means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--grid", action="store_true", help="the plots of Figure 6, of the first seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in arguments.seeds:
        folder = arguments.output / f"seed{seed}"
        train(folder, seed)
        done = folder / "quality.json"
        if not done.is_file():
            place = Playground(folder, seed)
            alone, chosen = compressed(place, folder)
            found = {"alone": alone, "merged": merged(place, chosen)}
            done.write_text(json.dumps(found, indent=1))
        results.append(json.loads(done.read_text()))
    if arguments.grid:
        grid(Playground(arguments.output / f"seed{arguments.seeds[0]}", arguments.seeds[0]), arguments.output)
    print(tables(results))


if __name__ == "__main__":
    main()
