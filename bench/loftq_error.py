"""The error of LoftQ's start against its iterations, beside the scores of a study: QR-Adaptor's Figure 2.

    python bench/loftq_error.py [--study runs/loftq] [--json]

error    the square root of the sum of ‖W - Q - BA‖² over the layers of the chain, before tuning (QR-Adaptor, eq. 1)
study    the folder of examples/qr_adaptor/figure2.yaml: mean score ± sample standard deviation over its seeds
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import dovetail
from dovetail.chains.layer.applied import applied
from dovetail.checkpoint.load import load
from dovetail.runs.yaml import read_yaml

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "examples" / "qr_adaptor" / "figure2.yaml"


def error(model_name: str, chain: str) -> float:
    """Return the error of the start of a chain."""
    model, _ = load(model_name)
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    dovetail.apply(model, chain)
    total = 0.0
    for name, layer in applied(model).layers.items():
        start, _ = layer.effective_weight()
        total += float((weights[f"{name}.weight"] - start.detach().double()).square().sum())
    return math.sqrt(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    asked = read_yaml(STUDY)
    rows = {row["name"]: row["chain"] for row in asked["rows"] if "chain" in row}
    figures: dict[Any, Any] = {}
    if options.study is not None:
        for result in json.loads((options.study / "study.json").read_text())["results"]:
            figures[result["row"], result["point"].get("iterations")] = result["figure"]
    found = []
    for row, chain in rows.items():
        for iterations in asked["vary"]["iterations"] if "{" in chain else [None]:
            start = error(asked["common"]["model"], chain.replace("{iterations}", str(iterations)))
            figure = figures.get((row, iterations))
            found.append({"row": row, "iterations": iterations, "error": start, "score": figure})
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print("| row | iterations | error | score (%) |\n|---|---:|---:|---:|")
    for line in found:
        score, told = line["score"], ""
        if score is not None:
            told = f"{100 * score['mean']:.1f}" + ("" if score["sd"] is None else f" ± {100 * score['sd']:.1f}")
        print(f"| {line['row']} | {line['iterations'] or '–'} | {line['error']:.4f} | {told} |")


if __name__ == "__main__":
    main()
