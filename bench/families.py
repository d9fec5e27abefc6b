"""The table of docs/families.md: what a chain covers of today's families.

    python bench/families.py [FAMILY ...] [--write]

parameters, covered, left out   of a model with the configuration that transformers makes by default, without storage
                                (device "meta"), for targets: all-linear
the other columns               of a tiny random model (`tests/todays_families.py`) under CHAIN: a backward pass reaches
                                the adapters, the merge is exact, and stock transformers loads what is saved, with the
                                same outputs; the fine-tuned model packs to a task vector
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import dovetail
from dovetail import experts
from dovetail.chains.layer.coverage import coverage
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.config import empty_model
from todays_families import FAMILIES, batch, make

CHAIN = "wanda(0.5) >> gptq(bits=4, group=16) >> lora(r=2) >> remask >> regrid"
PAGE, MARK = ROOT / "docs" / "families.md", "<!-- made by bench/families.py -->"
REAL: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": 8, "head_dim": 128},
}
"""What transformers' default configuration of a family lacks."""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"


def real(name: str) -> list[str]:
    """Return parameters, covered share and what is left out, at the size of the default configuration."""
    model = empty_model(CONFIG_MAPPING[name](**REAL.get(name, {})))
    total = sum(p.numel() for p in model.parameters())
    covered, left = coverage(model)
    said = ", ".join(f"{kind} {percent(count / total)}" for kind, count in left.items() if count / total >= 0.0005)
    return [f"{total / 1e9:.2f} B", percent(covered), said or "less than 0.1 %"]


def tiny(name: str) -> list[str]:
    """Return whether a tiny model is trained, merged, packed and loaded."""
    model, inputs = make(name), batch()
    dovetail.apply(model, CHAIN, calibration=[inputs])
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [p for layer in chain_layers(model).values() for p in layer.parameters() if p.requires_grad]
    reached = sum(p.grad is not None for p in trained) / len(trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for parameter in trained:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.eval()
        before = model(**inputs).logits
        report = dovetail.merge(model)
        same = torch.equal(model(**inputs).logits, before)
        model.save_pretrained(folder)
        vector = experts.task_vector(folder, make(name))
        stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        loaded = torch.equal(stock.eval()(**inputs).logits, before)
        loaded = loaded and not info["missing_keys"] and not info["unexpected_keys"]
    merged = "exact" if report.exact and same and report.max_abs_logit_diff == 0 else "differs"
    return [percent(reached), merged, "yes" if len(vector) else "no", "yes" if loaded else "no"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--write", action="store_true", help="replace the table in docs/families.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    heads = ("family", "parameters", "under the chain", "left out", "adapters reached", "merge", "packed", "loaded")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in asked.families:
        lines.append(f"| `{name}` | {' | '.join([*real(name), *tiny(name)])} |")
        print(lines[-1], flush=True)
    if asked.write:
        page = PAGE.read_text(encoding="utf-8")
        before, _, after = page.split(MARK)
        PAGE.write_text(f"{before}{MARK}\n" + "\n".join(lines) + f"\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
