"""Samplers on the table of assignments (bench/search_table.py), interpolated by an additive model.

    OMP_NUM_THREADS=1 python bench/search_samplers.py --output DIR [--seeds 30] [--page docs/search_samplers.png]

loss(bits, ranks) = c + sum over units of a_u * error_u(bits_u) + d_u * (1 - log2(rank_u) / 4), with a, d >= 0, fitted
to the full trainings of the table by ridge regression, whose strength is chosen by cross-validation. error_u is the
relative squared error of the unit's weights. The objectives are this loss and the exact bytes. A value is the
hypervolume of all trials, in a scale from 0 to 1 of each objective with reference point 1.1, divided by that of the
ideal front, which a knapsack solves exactly.

Each sampler runs with and without the start: 5 assignments of the knapsack on the gradient scores of the tuned model.
Optuna's NSGA-II has the population of three_stage (5): its default of 50 would be a random search. The seeds of all
samplers are the same, and differences are paired by seed. Results are kept in DIR/search_samplers.json, and those that
exist are not run again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna._hypervolume import compute_hypervolume
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_predict

from dovetail.files import write_whole
from dovetail.searches import ThreeStageSampler
from dovetail.searches.knapsack import Knapsack
from search_table import BITS, RANKS, SCORES, TABLE, read, units

TRIALS = (15, 25, 50)
POPULATION = 5
SHAPES = {
    "q_proj": (128, 128), "k_proj": (128, 128), "v_proj": (128, 128), "o_proj": (128, 128), "gate_proj": (384, 128),
    "up_proj": (384, 128), "down_proj": (128, 384),
}  # fmt: skip
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "three_stage": lambda seed: ThreeStageSampler(seed=seed),
    "nsga2": lambda seed: NSGAIISampler(population_size=POPULATION, seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}


class Problem:
    """Loss and bytes of each unit with each choice: the place of its bits times 4, plus that of its rank."""

    def __init__(self) -> None:
        scores = json.loads(SCORES.read_text())
        rows = [row for row in read(TABLE) if row["length"] == "full"]
        error = np.array([[sum(scores["weight_error"][n][b] for n in names) for b in range(4)] for names in units()])
        error /= error.max(1, keepdims=True)
        short = 1 - np.log2(RANKS) / 4
        features = np.array([
            [error[u][BITS.index(bits)] for u, bits in enumerate(row["bits"])]
            + [short[RANKS.index(rank)] for rank in row["ranks"]]
            for row in rows
        ])  # fmt: skip
        loss = np.array([row["validation_loss"] for row in rows])
        fits = {}
        for strength in np.logspace(-3, 2, 16):
            predicted = cross_val_predict(Ridge(alpha=strength, positive=True), features, loss, cv=10)
            fits[strength] = 1 - ((loss - predicted) ** 2).mean() / loss.var()
        strength = max(fits, key=lambda each: fits[each])
        self.fit = {"rows": len(rows), "r2_cross_validated": fits[strength], "strength": float(strength)}
        slopes = Ridge(alpha=strength, positive=True).fit(features, loss).coef_
        count = len(units())
        sides = [[SHAPES[name.rpartition(".")[2]] for name in names] for names in units()]
        self.loss = np.array([
            [slopes[u] * error[u][b] + slopes[count + u] * short[r] for b in range(4) for r in range(4)]
            for u in range(count)
        ])  # fmt: skip
        self.nbytes = np.array([
            [sum(o * i * bits * 65 / 512 + rank * (o + i) * 4 for o, i in each) for bits in BITS for rank in RANKS]
            for each in sides
        ])  # fmt: skip
        places = np.array([
            [BITS.index(b) * 4 + RANKS.index(r) for b, r in zip(row["bits"], row["ranks"], strict=True)] for row in rows
        ])  # fmt: skip
        rest = np.array([row["nbytes"] for row in rows]) - self.nbytes[np.arange(count), places].sum(1)
        assert np.ptp(rest) == 0, "the bytes of an assignment are not those of its units"
        tuned = scores["tuned"]
        wrong = np.array([[sum(scores["weight_error"][n][b] for n in names) for b in range(4)] for names in units()])
        energy = np.array([[sum(tuned["energy"][n][r] for n in names) for r in range(4)] for names in units()])
        left = energy[:, 3:] - energy
        worst, most = wrong.max(1).sum(), left.max(1).sum()
        guess = [[wrong[u][b] / worst + left[u][r] / most for b in range(4) for r in range(4)] for u in range(count)]
        self.start = Knapsack(guess, self.nbytes).front(float(self.nbytes.max(1).sum()), POPULATION)
        ideal = Knapsack(self.loss, self.nbytes)
        self.low = np.array([self.loss.min(1).sum(), self.nbytes.min(1).sum()])
        self.high = np.array([self.loss.max(1).sum(), self.nbytes.max(1).sum()])
        self.ideal = self.hypervolume(np.column_stack([ideal.scores, ideal.costs]))

    def values(self, choices: Sequence[int]) -> tuple[float, float]:
        at = np.arange(len(choices)), np.asarray(choices)
        return float(self.loss[at].sum()), float(self.nbytes[at].sum())

    def hypervolume(self, points: np.ndarray) -> float:
        return float(compute_hypervolume((points - self.low) / (self.high - self.low), np.array([1.1, 1.1])))

    def run(self, make: Callable[[int], BaseSampler], seed: int, started: bool) -> list[float]:
        """Return the share of the ideal hypervolume after each number of trials."""
        study = optuna.create_study(directions=["minimize"] * 2, sampler=make(seed))
        if started:
            for choices in self.start:
                study.enqueue_trial({
                    f"{kind}{u}": value for u, c in enumerate(choices) for kind, value in (("b", c // 4), ("r", c % 4))
                })  # fmt: skip

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            genes = [
                (trial.suggest_int(f"b{u}", 0, 3), trial.suggest_int(f"r{u}", 0, 3)) for u in range(len(self.loss))
            ]
            return self.values([bits * 4 + rank for bits, rank in genes])

        study.optimize(objective, n_trials=max(TRIALS))
        points = np.array([trial.values for trial in study.trials])
        return [self.hypervolume(points[:count]) / self.ideal for count in TRIALS]


def compare(path: Path, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Return sampler -> seed -> shares, from the file where it has them."""
    found: dict[str, dict[str, list[float]]] = json.loads(path.read_text()) if path.exists() else {}
    problem = Problem()
    print(problem.fit, flush=True)
    for seed in range(seeds):
        for name, make in SAMPLERS.items():
            for started in (True, False):
                title = f"{name}, started" if started else name
                if str(seed) not in found.setdefault(title, {}):
                    found[title][str(seed)] = problem.run(make, seed, started)
                    write_whole(path, json.dumps(found))
                    print(title, seed, found[title][str(seed)], flush=True)
    return found


def table(found: dict[str, dict[str, list[float]]], seeds: int) -> str:
    """Return means, and the paired differences of the started three_stage with each other sampler."""
    values = {name: np.array([rows[str(seed)] for seed in range(seeds)]) for name, rows in found.items()}
    lines = ["| sampler | " + " | ".join(f"{count} trials" for count in TRIALS) + " |", "|---|" + "---:|" * len(TRIALS)]
    ours = values["three_stage, started"]
    draw = np.random.default_rng(0).integers(seeds, size=(2000, seeds))
    for name, rows in values.items():
        cells = []
        for place in range(len(TRIALS)):
            difference = ours[:, place] - rows[:, place]
            low, high = np.percentile(difference[draw].mean(1), [2.5, 97.5])
            paired = "" if rows is ours else f" (behind by {difference.mean():+.3f}, {low:+.3f} to {high:+.3f})"
            cells.append(f"{rows[:, place].mean():.3f}{paired}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw Figure 8 of QR-Adaptor: hypervolume against trials."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    for place, (name, rows) in enumerate(found.items()):
        values = np.array(list(rows.values()))
        error = 1.96 * values.std(0, ddof=1) / len(values) ** 0.5
        style: dict[str, Any] = {"linestyle": "-" if "started" in name else "--", "color": f"C{place // 2}"}
        axes.errorbar(TRIALS, values.mean(0), yerr=error, label=name, capsize=2, **style)
    axes.set_xlabel("trials")
    axes.set_ylabel("share of the ideal hypervolume")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--page", type=Path, help="where to draw the figure")
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    asked.output.mkdir(parents=True, exist_ok=True)
    found = compare(asked.output / "search_samplers.json", asked.seeds)
    print(table(found, asked.seeds))
    if asked.page is not None:
        draw(found, asked.page)


if __name__ == "__main__":
    main()
