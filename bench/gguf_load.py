"""Load a GGUF file on its own grid: processor time against reading its bytes once, and peak memory.

    python bench/gguf_load.py MODEL.gguf

One thread. Times are the best of several, of the kept layers alone and of the whole model without its tokenizer; the
floor reads the bytes of the layers and copies them once. Peak memory is that of the process above what it had before
the model was made, with the model's class imported.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM

from dovetail.checkpoint.config import empty_model, load_config
from dovetail.checkpoint.formats.gguf import checked_header, kept_tensors, load_kept
from dovetail.checkpoint.formats.gguf.keep import read_grid
from dovetail.checkpoint.formats.gguf.names import read_bytes


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the least processor time of a run."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return min(found)


def peak() -> float:
    """Return the peak memory of the process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    torch.set_num_threads(1)
    header, config = checked_header(path), load_config(path)
    kept = kept_tensors(header, empty_model(config))
    before = peak()
    load_kept(header, config, AutoModelForCausalLM, torch.float32)
    used = peak() - before
    floor = seconds(lambda: [read_bytes(header, each.name).copy() for each in kept.values()], 7)
    layers = seconds(lambda: [read_grid(header, each) for each in kept.values()], 7)
    whole = seconds(lambda: load_kept(header, config, AutoModelForCausalLM, torch.float32), 3)
    print(f"kept layers: {layers:.3f} s, {layers / floor:.1f} times the floor of {floor:.3f} s")
    print(f"whole model: {whole:.2f} s; peak {used:.0f} MB above the start")


if __name__ == "__main__":
    main()
