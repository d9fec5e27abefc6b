"""Live searches over bits and ranks beside uniform QLoRA models: what they find, and what they cost.

    OMP_NUM_THREADS=1 python bench/layers.py OUTPUT [--seeds 3]

The playground on word problems, `int(bits=b, group=64) >> lora(r=r)`, 144 steps of 16 records. Every row is a `dovetail
run` (uniform models of 2, 3, 4 and 8 bits with rank 8) or a `dovetail search` (9 trials in rungs, at most 5.5 bits per
weight) in a folder of OUTPUT; finished rows are kept. Scores are of the test split, on its first 500 records. Costs are
processor seconds of the whole call; a search is divided by the mean of the uniform runs of its seed.

The last row, of seed 0 alone, is 25 full trainings that NSGA-II proposes without a start. The hypervolumes of its
front and of that of 9 trials are over the validation accuracy of 128 records and the bytes, each scaled to [0, 1] over
the trials of both, with reference point 1.1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from optuna._hypervolume import compute_hypervolume

from dovetail.searches.report import SearchReport

os.environ.setdefault("OMP_NUM_THREADS", "1")

BITS, BUDGET, STEPS = (2, 3, 4, 8), 5.5, 144


def recipe(seed: int, bits: int, **changes: Any) -> dict[str, Any]:
    return {
        "model": "playground", "chain": f"int(bits={bits}, group=64) >> lora(r=8)", "seed": seed, "merge": "none",
        "data": {"task": "word_problems"}, "train": {"max_steps": STEPS, "batch_size": 16, "lr_scale": 10},
        "evaluate": {"limit": 500}, "calibration": {"inputs": "original"}, **changes,
    }  # fmt: skip


def full_trainings(trials: int) -> dict[str, Any]:
    """The settings of a search whose candidates NSGA-II proposes, each trained in full."""
    return {"search": {
        "kind": "layers", "trials": trials, "start": "none", "sampler": "nsga2", "samples": 128, "finish": "none",
        "budget": {"bits_per_weight": BUDGET},
    }}  # fmt: skip


def hypervolumes(*places: Path) -> list[float]:
    """The hypervolume of the front of each search."""
    points = [
        np.array([[-trial.values["quality"], trial.values["nbytes"]] for trial in SearchReport.load(place).trials])
        for place in places
    ]
    whole = np.concatenate(points)
    low, high = whole.min(0), whole.max(0)
    reference = np.array([1.1, 1.1])
    return [float(compute_hypervolume((each - low) / (high - low), reference)) for each in points]


def search(trials: int) -> dict[str, Any]:
    rungs = [STEPS // 9, STEPS // 3, STEPS]
    return {"search": {
        "kind": "layers", "trials": trials, "rungs": rungs, "samples": 128, "budget": {"bits_per_weight": BUDGET},
    }}  # fmt: skip


def timed(place: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run the recipe in a process of its own, and return its score, size and processor seconds."""
    kept = place.with_suffix(".json")
    if kept.is_file():
        return json.loads(kept.read_text())
    code = "import sys, json, dovetail; getattr(dovetail, sys.argv[1])(json.loads(sys.argv[2]), output=sys.argv[3])"
    verb = "search" if "search" in given else "run"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, verb, json.dumps(given), str(place)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, Any] = {"seconds": seconds}
    finished = place / "best" if verb == "search" else place
    if (finished / "report.json").is_file():
        last = json.loads((finished / "report.json").read_text())["stages"][-1]
        found |= {
            "accuracy": last["metrics"]["word_problems"]["exact_match"], "nbytes": last["footprint"]["nbytes"],
            "bits_per_weight": last["footprint"]["bits_per_weight"],
        }  # fmt: skip
    if verb == "search":
        found["headline"] = json.loads((place / "search.json").read_text())["headline"]
    kept.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(asked.seeds):
        for bits in BITS:
            rows.setdefault(f"uniform {bits} bits", []).append(
                timed(asked.output / f"uniform-{bits}-{seed}", recipe(seed, bits))
            )
        for trials in (9, 3):
            found = timed(asked.output / f"search-{trials}-{seed}", recipe(seed, 4, **search(trials)))
            full = fmean(rows[f"uniform {bits} bits"][seed]["seconds"] for bits in BITS)
            rows.setdefault(f"search, {trials} trials", []).append(found | {"cost": found["seconds"] / full})
    for name, found in rows.items():
        seconds = fmean(each["seconds"] for each in found)
        scores = ", ".join(f"{100 * each['accuracy']:.1f}" for each in found)
        print(
            f"{name:20} accuracy {scores} %; {fmean(each['bits_per_weight'] for each in found):.2f} bits; "
            f"{fmean(each['nbytes'] for each in found):,.0f} bytes; {seconds:.0f} CPU s"
            + (f"; {fmean(each['cost'] for each in found):.2f} x one training" if "cost" in found[0] else "")
        )
    many = timed(asked.output / "nsga2-25-0", recipe(0, 4, **full_trainings(25)))
    few, all_trained = hypervolumes(asked.output / "search-9-0", asked.output / "nsga2-25-0")
    print(
        f"hypervolume of 9 trials {few:.3f}, of 25 full trainings {all_trained:.3f}, which took {many['seconds']:.0f} s"
    )
    (asked.output / "results.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
