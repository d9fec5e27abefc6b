"""How long `dovetail plan` takes, and how near its peak of memory is to a real training's.

    python bench/plan.py times                      processor seconds of whole processes at 1.1 B, 8 B and 70 B, medians
    python bench/plan.py errors FOLDER [--billion]  predicted against measured peaks of ten trainings of a checkpoint;
                                                    with --billion also of a random Llama of 1.1 B (6 GB of memory)

A measured peak is the count of live tensors over two training steps, as in `peak_memory_nbytes` of a report.
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
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "1.1 B": {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "num_attention_heads": 32,
              "num_key_value_heads": 4, "vocab_size": 32000},
    "8 B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256},
    "70 B": {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
CHAINS = [
    "nf4 >> lora(r=16)",
    "nf4(double=true) >> lora(r=8) >> regrid",
    "wanda(0.5) >> gptq(bits=4, group=64) >> lora(r=16) >> remask >> regrid",
]
SETTINGS: list[dict[str, Any]] = [
    {"chain": "lora(r=16)"},
    {"chain": "lora(r=16)", "batch_size": 4},
    {"chain": "lora(r=16)", "batch_size": 4, "gradient_checkpointing": True},
    {"chain": "dora(r=8)", "batch_size": 2},
    {"chain": "nf4 >> lora(r=16)"},
    {"chain": "nf4 >> lora(r=16)", "batch_size": 2, "gradient_checkpointing": True},
    {"chain": "nf4 >> lora(r=16) >> regrid"},
    {"chain": "nf4 >> lora(r=16) >> regrid(start=codes)"},
    {"chain": "magnitude(0.5) >> int(bits=4, group=64) >> lora(r=16) >> remask >> regrid", "batch_size": 2},
    {"chain": "int(bits=8, group=64) >> vera(r=16)", "batch_size": 2, "length": 96},
]
LENGTH = 64


def times(repeats: int) -> list[dict[str, Any]]:
    """Return the processor seconds of `import transformers.modeling_utils` and of plans, as medians."""
    imported = _seconds([sys.executable, "-c", "import transformers.modeling_utils"], repeats)
    rows = [{"what": "import transformers.modeling_utils", "seconds": imported}]
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in SIZES.items():
            said = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **sizes}
            (Path(folder) / "config.json").write_text(json.dumps(said))
            for text in CHAINS:
                command = [sys.executable, "-m", "dovetail", "plan", text, "--model", folder, "--batch-size", "1"]
                seconds = _seconds(command, repeats)
                rows.append({"what": f"{name}: {text}", "seconds": seconds, "beside imports": seconds - imported})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _seconds(command: list[str], repeats: int) -> float:
    """Return the median of user and system seconds of a process on one thread."""
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return round(statistics.median(found), 2)


def errors(folder: str, billion: bool) -> list[dict[str, Any]]:
    """Return predicted and measured peaks, and whether a GPU of 5 % more and of 5 % less is said to fit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import dovetail

    torch.set_num_threads(1)
    rows = []
    for setting in SETTINGS:
        model, _ = dovetail.load(folder)
        rows.append(_compare(model, setting))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if billion:
        torch.manual_seed(0)
        with torch.no_grad():
            model = LlamaForCausalLM(LlamaConfig(**SIZES["1.1 B"]))
        rows.append(_compare(model, {"chain": "lora(r=16)"}))
    return rows


def _compare(model: Any, setting: dict[str, Any]) -> dict[str, Any]:
    import torch

    import dovetail
    from dovetail.training.optimizer import make_optimizer
    from dovetail.training.peak_memory import PeakMemory
    from dovetail.training.settings import TrainSettings

    options = {"batch_size": 1, "length": LENGTH, "gradient_checkpointing": False} | setting
    text = options.pop("chain")
    planned = dovetail.plan(text, model.config, dtype=str(model.dtype).removeprefix("torch."), **options)
    dovetail.apply(model, text)
    rows, length = options["batch_size"], options["length"]
    settings = TrainSettings(batch_size=rows, gradient_checkpointing=options["gradient_checkpointing"])
    ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model.train()
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = make_optimizer(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    with PeakMemory([*model.parameters(), *model.buffers()]) as memory:
        for _ in range(2):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            model.zero_grad()
    predicted, measured = planned.predicted_peak_memory_nbytes or 0, memory.peak_nbytes
    said = [predicted <= size for size in (1.05 * measured, 0.95 * measured)]
    return {
        "chain": text, **options, "predicted": predicted, "measured": measured,
        "error": round(predicted / measured - 1, 4), "right": said == [True, False],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("times").add_argument("--repeats", type=int, default=3)
    compared = commands.add_parser("errors")
    compared.add_argument("folder")
    compared.add_argument("--billion", action="store_true")
    asked = parser.parse_args()
    found = times(asked.repeats) if asked.command == "times" else errors(asked.folder, asked.billion)
    print(json.dumps(found, indent=1))
