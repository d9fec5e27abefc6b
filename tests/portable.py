"""Run the numeric part of the suite as on other processors: `make portable`, or with names of settings.

    python tests/portable.py [--workers 2] [--only sse41 avx2] [-- arguments for pytest]

Each setting limits what the libraries use of the processor, through the libraries' own environment variables. One line
is printed for each; the failed tests follow it. The exit code is 1 if a setting failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
FOLDERS = ["chains", "links", "contract", "compression", "checkpoint"]
LAWS = ["codec", "every_target_counts", "import_is_peft", "merging", "packing_laws", "second_round", "verdict"]
"""The laws that are about numbers; the others are about files, names and errors."""
SETTINGS: dict[str, dict[str, str]] = {
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    "numba-generic": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    "1-thread": {"DOVETAIL_TEST_THREADS": "1"},
    "2-threads": {"DOVETAIL_TEST_THREADS": "2"},
    "no-bitsandbytes": {"DOVETAIL_TEST_WITHOUT": "bitsandbytes"},
}
ONLY_NUMBA = ["experts/test_experts.py", "links/test_quantize.py", "links/test_sparsify.py"]
"""The tests of what numba compiles, the codec of experts and the loops of grids, in place of all others."""


def run(name: str, workers: str, arguments: list[str]) -> bool:
    """Run the numeric tests under a setting, print one line and the failures, and return whether all passed."""
    places = ONLY_NUMBA if name.startswith("numba") else [*FOLDERS, *(f"laws/test_{law}.py" for law in LAWS)]
    places = [str(TESTS / place) for place in places if (TESTS / place).exists()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        workers,
        "-o",
        "addopts=-q -rfE --strict-markers --tb=short",
        *places,
    ]
    start = time.monotonic()
    done = subprocess.run(
        [*command, *arguments], env=os.environ | SETTINGS[name], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [""]
    summary = re.sub(r" in [\d.]+s.*|=", "", lines[-1]).strip()
    variables = " ".join(f"{key}={value}" for key, value in SETTINGS[name].items())
    print(f"{'ok' if done.returncode == 0 else 'FAILED':6} {name:15} {variables}: {summary}", end=", ")
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-5_000:], sep="\n", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run every setting that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="2", help="processes of pytest-xdist")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings to run")
    parser.add_argument("arguments", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    passed = [run(name, options.workers, options.arguments) for name in options.only]
    return int(not all(passed))


if __name__ == "__main__":
    raise SystemExit(main())
