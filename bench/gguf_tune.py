"""A Q4_K_M file tuned in its own grid: what merging costs, and whether llama.cpp scores what Dovetail scores.

    python bench/gguf_tune.py MODEL.gguf DATA OUTPUT [--steps 100] [--questions 100]

DATA is a folder with mawps/train.jsonl and mawps/test.jsonl. `keep >> lora(r=16) >> regrid` and, as peers do, an open
`keep >> lora(r=16)` are trained on MAWPS over the grid of the file. Merged models are written as GGUF files of the same
formats:

    kept       the first one, merged: only codes differ from the file
    anew       the open LoRA added to the dequantized weights, which are quantized anew by ggml's own rule
    rounded    the open LoRA added, and rounded to the nearest codes of the file's grid

Each is scored by greedy decoding in Dovetail (dequantized weights, float32) and in llama.cpp (package xllamacpp).
Training and every score are kept in OUTPUT, so the script can be killed and started again; it writes OUTPUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import dovetail

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "gemma"))
from prepare import records

CHAINS = {"kept": "keep >> lora(r=16) >> regrid", "open": "keep >> lora(r=16)"}


def tuned(name: str, file: Path, data: Path, output: Path, steps: int) -> Any:
    """Return the model under its chain, trained; training is resumed, and its adapter kept."""
    model, tokenizer = dovetail.load(file, grid="keep")
    adapter, training = output / name / "adapter", output / name / "training"
    if (adapter / "adapter.json").is_file():
        return dovetail.load_adapter(model, adapter), tokenizer
    dovetail.apply(model, CHAINS[name], seed=0)
    began = time.perf_counter()
    report = dovetail.train(
        model, tokenizer, records(data, "mawps", "train"), max_steps=steps, batch_size=4, max_length=96, warmup=0.1,
        seed=0, output_dir=training, resume=training.exists(), checkpoint_every=10,
        on_log=lambda *said, **more: print(said, more, f"{time.perf_counter() - began:.0f} s", flush=True),
    )  # fmt: skip
    dovetail.save_adapter(model, adapter)
    (output / name / "seconds.json").write_text(json.dumps(time.perf_counter() - began))
    print(name, report.stages[-1], flush=True)
    return model, tokenizer


def main() -> None:
    """Train, merge, write and score what is not in OUTPUT yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--train-only", choices=CHAINS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    for name in [given.train_only] if given.train_only else CHAINS:
        tuned(name, given.file, given.data, given.output, given.steps)


if __name__ == "__main__":
    main()
