"""Wall time of a study of eight cells with one job and with two, in interleaved rounds.

    python bench/study_jobs.py [--rounds 3] [--steps 60] [--json]

cells    lora(r=8) and nf4 >> lora(r=8) on the playground's word problems, with four seeds each
rows     "1 job" has one thread, as each of the two jobs has; "1 job, all threads" is what a study without --jobs does
equal    every round runs the same steps, and the scores with one thread must be the same
target   at most 0.6 of the time of one job with one thread

Each study is a process of its own with a new folder, so that the start of Python counts on both sides. The times are
wall times, so other programs must not run: the processor seconds that they took are printed beside each time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from dovetail.runs.yaml import write_yaml

TARGET = 0.6
KINDS = {"1 job": (1, "1"), "2 jobs": (2, "1"), "1 job, all threads": (1, "")}
"""Name -> the number of jobs, and OMP_NUM_THREADS."""


def asked(steps: int) -> dict[str, Any]:
    return {
        "title": "Eight cells",
        "common": {
            "model": "playground", "data": {"task": "word_problems"}, "merge": "none",
            "train": {"max_steps": steps, "batch_size": 32, "lr_scale": 5}, "evaluate": {"limit": 200},
        },
        "seeds": [0, 1, 2, 3],
        "rows": [{"name": "lora", "chain": "lora(r=8)"}, {"name": "qlora", "chain": "nf4 >> lora(r=8)"}],
    }  # fmt: skip


def busy_seconds() -> tuple[float, float]:
    """Return the processor seconds of the whole machine, and those of the studies so far."""
    machine, studies = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return machine.user + machine.nice + machine.system, studies.ru_utime + studies.ru_stime


def measure(kind: str, study: Path, output: Path) -> tuple[float, float, int, list[float]]:
    """Return the seconds of a study, the processor seconds of other programs, its steps, and its scores."""
    jobs, threads = KINDS[kind]
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    if not threads:
        del environment["OMP_NUM_THREADS"]
    command = [sys.executable, "-m", "dovetail", "study", str(study), "--output", str(output), "--jobs", str(jobs)]
    started, (machine, studies) = time.perf_counter(), busy_seconds()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    machine_now, studies_now = busy_seconds()
    others = max(0.0, machine_now - machine - (studies_now - studies))
    cells = json.loads((output / "study.json").read_text())["cells"]
    return seconds, others, sum(cell["steps"] for cell in cells), [cell["score"] for cell in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    others: dict[str, list[float]] = {kind: [] for kind in KINDS}
    scores: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        study, spec = Path(folder) / "study.yaml", asked(options.steps)
        write_yaml(study, spec)
        wanted = options.steps * len(spec["rows"]) * len(spec["seeds"])
        for number in range(options.rounds):
            for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                spent, taken, steps, found = measure(kind, study, Path(folder) / f"{number} {kind}")
                if steps != wanted:
                    raise SystemExit(f"{kind}: {steps} steps instead of {wanted}")
                if kind != "1 job, all threads" and scores.setdefault("one thread", found) != found:
                    raise SystemExit(f"{kind}: the scores differ from those of the first study")
                seconds[kind].append(spent)
                others[kind].append(taken)
    middle = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = {kind: middle["2 jobs"] / middle[kind] for kind in KINDS if kind != "2 jobs"}
    if options.json:
        print(json.dumps({"steps": options.steps, "seconds": seconds, "others": others, "ratio": ratios}, indent=2))
        return
    for kind, values in seconds.items():
        rounds = ", ".join(
            f"{value:.1f} (others {taken:.1f})" for value, taken in zip(values, others[kind], strict=True)
        )
        print(f"{kind:20s} median {middle[kind]:7.1f} s   {rounds}")
    met = "met" if ratios["1 job"] <= TARGET else "MISSED"
    print(f"2 jobs / 1 job {ratios['1 job']:.3f} (at most {TARGET}: {met})")
    print(f"2 jobs / 1 job, all threads {ratios['1 job, all threads']:.3f}")


if __name__ == "__main__":
    main()
