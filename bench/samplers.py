"""The samplers of `dovetail.searches` beside Optuna's and pymoo's on functions with known optima.

    OMP_NUM_THREADS=1 python bench/samplers.py --output DIR [--only zdt,dtlz,refine] [--seeds 10]

zdt     ZDT1, ZDT2 and ZDT3 with 6 integer genes of 21 values, 200 evaluations, population 20: hypervolume of all
        evaluated points, reference point (1.1, 10)
dtlz    DTLZ2 with 3 objectives and 7 floats, 300 evaluations, population 20: hypervolume, reference point
        (1.1, 1.1, 1.1), and (2.5, 2.5, 2.5), which counts points far from the front too
refine  one objective, 6 floats, 30 evaluations, optimum off the centre: best value found

Means and standard deviations over the seeds. pymoo's NSGA-II runs with its defaults (SBX of eta 15, mutation of eta 20,
rounded for integers) and, where genes are integers, also with the operators that its documentation advises for them
(eta 3, probability 1). Each result is kept in DIR/samplers.json, and those that exist are not run again. `pip install
dovetail[bench]` installs pymoo.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.indicators.hv import HV
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize

from dovetail.files import write_whole
from dovetail.searches import PRGASampler, RefineSampler

POPULATION = 20
Point = Sequence[float]
Sampler = Callable[[int], BaseSampler]


# --- Functions -------------------------------------------------------------------------------------------------------
def zdt1(x: Point) -> list[float]:
    g = 1 + 9 * fmean(x[1:])
    return [x[0], g * (1 - math.sqrt(x[0] / g))]


def zdt2(x: Point) -> list[float]:
    g = 1 + 9 * fmean(x[1:])
    return [x[0], g * (1 - (x[0] / g) ** 2)]


def zdt3(x: Point) -> list[float]:
    g = 1 + 9 * fmean(x[1:])
    return [x[0], g * (1 - math.sqrt(x[0] / g) - x[0] / g * math.sin(10 * math.pi * x[0]))]


def dtlz2(x: Point) -> list[float]:
    g = sum((value - 0.5) ** 2 for value in x[2:])
    a, b = (math.pi / 2 * value for value in x[:2])
    return [(1 + g) * f for f in (math.cos(a) * math.cos(b), math.cos(a) * math.sin(b), math.sin(a))]


def sphere(z: np.ndarray) -> float:
    return float((z**2).sum())


def rosenbrock(z: np.ndarray) -> float:
    z = z + 1
    return float((100 * (z[1:] - z[:-1] ** 2) ** 2 + (1 - z[:-1]) ** 2).sum())


def rastrigin(z: np.ndarray) -> float:
    return float((z**2 - 10 * np.cos(2 * np.pi * z) + 10).sum())


def ackley(z: np.ndarray) -> float:
    spread, waves = np.sqrt((z**2).mean()), np.cos(2 * np.pi * z).mean()
    return float(20 + math.e - 20 * np.exp(-0.2 * spread) - np.exp(waves))


def griewank(z: np.ndarray) -> float:
    return float(1 + (z**2).sum() / 4000 - np.cos(z / np.sqrt(np.arange(1, len(z) + 1))).prod())


SINGLE: Mapping[str, tuple[Callable[[np.ndarray], float], float]] = {
    "sphere": (sphere, 5.12),
    "rosenbrock": (rosenbrock, 2.048),
    "rastrigin": (rastrigin, 5.12),
    "ackley": (ackley, 32.768),
    "griewank": (griewank, 600.0),
}
"""Function of z, whose optimum is 0, and the half width of the domain."""
OPTIMUM = np.array([0.27, -0.31, 0.42, -0.18, 0.36, -0.44])
"""Where the optimum of the single objectives lies, in half widths from the centre."""


# --- Runs ------------------------------------------------------------------------------------------------------------
def with_optuna(
    function: Callable[[Point], list[float]], sampler: BaseSampler, genes: int, integers: bool, trials: int
) -> list[list[float]]:
    """Return the values of all trials."""

    def objective(trial: optuna.Trial) -> list[float]:
        if integers:
            return function([trial.suggest_int(f"x{place}", 0, 20) / 20 for place in range(genes)])
        return function([trial.suggest_float(f"x{place}", 0, 1) for place in range(genes)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        objectives = len(function([0.5] * genes))
        study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
        study.optimize(objective, n_trials=trials)
    return [trial.values for trial in study.trials]


def with_pymoo(
    function: Callable[[Point], list[float]],
    operators: Mapping[str, Any],
    genes: int,
    integers: bool,
    trials: int,
    seed: int,
) -> list[list[float]]:
    """Return the values of all evaluations of pymoo's NSGA-II."""
    found: list[list[float]] = []

    class Recorded(Problem):
        def __init__(self) -> None:
            upper, objectives = (20 if integers else 1), len(function([0.5] * genes))
            super().__init__(n_var=genes, n_obj=objectives, xl=0, xu=upper, vtype=int if integers else float)

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            values = [function((row / 20 if integers else row).tolist()) for row in x]
            found.extend(values)
            out["F"] = np.array(values)

    minimize(Recorded(), NSGA2(pop_size=POPULATION, **operators), ("n_eval", trials), seed=seed, verbose=False)
    return found[:trials]


def integer_operators(crossover_eta: float, mutation_eta: float, probability: float) -> dict[str, Any]:
    rounding = RoundingRepair()
    return {
        "sampling": IntegerRandomSampling(),
        "crossover": SBX(eta=crossover_eta, prob=probability, vtype=float, repair=rounding),
        "mutation": PM(eta=mutation_eta, prob=probability, vtype=float, repair=rounding),
    }


def nsga2(seed: int) -> BaseSampler:
    return NSGAIISampler(population_size=POPULATION, seed=seed)


def nsga2_sbx(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        crossover, mutation = SBXCrossover(), PolynomialMutation()
    return NSGAIISampler(population_size=POPULATION, crossover=crossover, mutation=mutation, seed=seed)


def prga(seed: int) -> BaseSampler:
    return PRGASampler(population_size=POPULATION, seed=seed)


def prga_paper(seed: int) -> BaseSampler:
    return PRGASampler(population_size=POPULATION, variant="paper", crossover_eta=20, mutation_eta=20, seed=seed)


GENETIC: Mapping[str, Sampler] = {
    "PRGA": prga,
    'PRGA, "paper", eta 20': prga_paper,
    "Optuna NSGA-II": nsga2,
    "Optuna NSGA-II, SBX + PM": nsga2_sbx,
}
SINGLE_SAMPLERS: Mapping[str, Sampler] = {
    "Refine, matern": lambda seed: RefineSampler(seed=seed),
    "Refine, rbf": lambda seed: RefineSampler(kernel="rbf", seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
    "TPE": lambda seed: TPESampler(seed=seed),
}


class Results:
    """Numbers by name, in a file; a number that is there is not computed again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def get(self, name: str, compute: Callable[[], float]) -> float:
        if name not in self.found:
            self.found[name] = compute()
            write_whole(self.file, json.dumps(self.found, indent=1))
        return self.found[name]


def hypervolume(values: Sequence[Point], reference: Point) -> float:
    return float(HV(ref_point=np.array(reference))(np.array(values)))


def show(title: str, rows: Mapping[str, list[float]], ours: str, targets: Mapping[str, float]) -> None:
    """Print mean and standard deviation of each method, and the ratio of our mean to it beside its target."""
    print(f"\n{title}\n{'':28s} {'mean':>9s} {'sd':>8s} {'ours / it':>10s}  target")
    for name, values in rows.items():
        ratio = fmean(rows[ours]) / fmean(values)
        target = targets.get(name)
        verdict = "" if target is None else f"{target:6.2f}  {'met' if ratio >= target else 'MISSED'}"
        print(f"{name:28s} {fmean(values):9.4f} {stdev(values):8.4f} {ratio:10.3f}  {verdict}", flush=True)


def zdt(results: Results, seeds: int) -> None:
    operators = {
        "pymoo NSGA-II": integer_operators(15, 20, 0.9),
        "pymoo NSGA-II, eta 3": integer_operators(3, 3, 1.0),
    }
    targets = {"Optuna NSGA-II": 1.03, "Optuna NSGA-II, SBX + PM": 1.0, **dict.fromkeys(operators, 1.0)}
    for function in (zdt1, zdt2, zdt3):
        rows: dict[str, list[float]] = {}
        for name, make in GENETIC.items():
            rows[name] = [
                results.get(
                    f"{function.__name__}/{name}/{seed}",
                    lambda f=function, m=make, s=seed: hypervolume(with_optuna(f, m(s), 6, True, 200), (1.1, 10)),
                )
                for seed in range(seeds)
            ]
        for name, given in operators.items():
            rows[name] = [
                results.get(
                    f"{function.__name__}/{name}/{seed}",
                    lambda f=function, o=given, s=seed: hypervolume(with_pymoo(f, o, 6, True, 200, s), (1.1, 10)),
                )
                for seed in range(seeds)
            ]
        show(f"{function.__name__}: hypervolume, {seeds} seeds", rows, "PRGA", targets)


def dtlz(results: Results, seeds: int) -> None:
    for reference in (1.1, 2.5):
        rows: dict[str, list[float]] = {}
        for name, make in GENETIC.items():
            rows[name] = [
                results.get(
                    f"dtlz2 {reference}/{name}/{seed}",
                    lambda m=make, s=seed, r=reference: hypervolume(with_optuna(dtlz2, m(s), 7, False, 300), (r,) * 3),
                )
                for seed in range(seeds)
            ]
        rows["pymoo NSGA-II"] = [
            results.get(
                f"dtlz2 {reference}/pymoo/{seed}",
                lambda s=seed, r=reference: hypervolume(with_pymoo(dtlz2, {}, 7, False, 300, s), (r,) * 3),
            )
            for seed in range(seeds)
        ]
        show(f"dtlz2: hypervolume to {reference}, {seeds} seeds", rows, "PRGA", {"pymoo NSGA-II": 1.0})


def refine(results: Results, seeds: int) -> None:
    lower = 0
    table: dict[str, dict[str, list[float]]] = {}
    for function, (value, half) in SINGLE.items():

        def single(x: Point, value: Callable[[np.ndarray], float] = value, half: float = half) -> list[float]:
            return [value((2 * np.array(x) - 1 - OPTIMUM) * half)]

        table[function] = {
            name: [
                results.get(
                    f"{function}/{name}/{seed}",
                    lambda f=single, m=make, s=seed: min(v for (v,) in with_optuna(f, m(s), 6, False, 30)),
                )
                for seed in range(seeds)
            ]
            for name, make in SINGLE_SAMPLERS.items()
        }
        lower += fmean(table[function]["Refine, matern"]) < fmean(table[function]["random"])
    print(
        f"\nbest of 30 evaluations, mean (sd) over {seeds} seeds\n{'':12s}"
        + "".join(f"{n:>22s}" for n in SINGLE_SAMPLERS)
    )
    for function, rows in table.items():
        print(f"{function:12s}" + "".join(f"{fmean(v):13.3f} ({stdev(v):.2g})".rjust(22) for v in rows.values()))
    print(f"matern is lower than random on {lower} of {len(SINGLE)}; target {len(SINGLE)}: ", end="")
    print("met" if lower == len(SINGLE) else "MISSED")


TABLES = {"zdt": zdt, "dtlz": dtlz, "refine": refine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default=",".join(TABLES), help="tables to run")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.output / "samplers.json")
    for name in arguments.only.split(","):
        TABLES[name](results, arguments.seeds)


if __name__ == "__main__":
    main()
