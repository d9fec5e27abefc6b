"""Live searches over bits and ranks beside uniform QLoRA models: what they find, and what they cost.

    OMP_NUM_THREADS=1 python bench/layers.py OUTPUT [--seeds 3]

The playground on word problems, `int(bits=b, group=64) >> lora(r=r)`, 144 steps of 16 records. Every row is a `dovetail
run` (uniform models of 2, 3, 4 and 8 bits with rank 8) or a `dovetail search` (9 trials in rungs, at most 5.5 bits per
weight) in a folder of OUTPUT; finished rows are kept. Scores are of the test split, on its first 500 records. Costs are
processor seconds of the whole call; a search is divided by the mean of the uniform runs of its seed.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")

BITS, BUDGET, STEPS = (2, 3, 4, 8), 5.5, 144


def recipe(seed: int, bits: int, **changes: Any) -> dict[str, Any]:
    return {
        "model": "playground", "chain": f"int(bits={bits}, group=64) >> lora(r=8)", "seed": seed, "merge": "none",
        "data": {"task": "word_problems"}, "train": {"max_steps": STEPS, "batch_size": 16, "lr_scale": 10},
        "evaluate": {"limit": 500}, "calibration": {"inputs": "original"}, **changes,
    }  # fmt: skip


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
    report = json.loads(((place / "best" if verb == "search" else place) / "report.json").read_text())
    last = report["stages"][-1]
    found = {
        "accuracy": last["metrics"]["word_problems"]["exact_match"], "nbytes": last["footprint"]["nbytes"],
        "bits_per_weight": last["footprint"]["bits_per_weight"], "seconds": seconds,
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
    (asked.output / "results.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
