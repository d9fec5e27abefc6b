"""Measure the scores of docs/playground.md: `python bench/playground/figures.py`.

The loops and the LoRA, Wanda and INT4 here are minimal and use none of the library's, so the scores describe the
playground and not the library.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dovetail.tasks.playground import MODEL_DIR, TASKS, task
from dovetail.tasks.task import Record

GROUP = 64
"""Weights that share a scale and a zero point in INT4."""

STEPS, BATCH = 300, 32
FULL_LR, LORA_LR = 1e-3, 4e-3

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


class TunedLinear(nn.Module):
    """A linear layer with LoRA; after pruning the update stays in the mask, after INT4 the sum stays on the grid."""

    def __init__(self, linear: nn.Linear, rank: int, bits: int = 0) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.down = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.mask = (linear.weight != 0).float()
        self.grid = grid_of(self.weight, bits) if bits else None
        self.scale = 2.0  # alpha = 2 r

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.scale * (self.up @ self.down) * self.mask
        if self.grid is not None:
            weight = weight + (on_grid(weight.detach(), *self.grid) - weight).detach()
        return nn.functional.linear(x, weight)


def grid_of(weight_oi: Tensor, bits: int) -> tuple[Tensor, Tensor, int]:
    """Scale and zero point of each group of weights, and the largest code; zero is always on the grid."""
    groups = weight_oi.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    largest = 2**bits - 1
    scale = ((high - low) / largest).clamp(min=1e-8)
    return scale, (-low / scale).round(), largest


def on_grid(weight_oi: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
    """Each weight rounded to the nearest value of its group's grid."""
    codes = (weight_oi.unflatten(1, (-1, GROUP)) / scale + zero).round().clamp(0, largest)
    return ((codes - zero) * scale).flatten(1)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks: all but the output head."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def add_lora(model: nn.Module, *, rank: int = 16, bits: int = 0) -> list[nn.Parameter]:
    """Replace the linear layers of the blocks by TunedLinear; returns what there is to train."""
    model.requires_grad_(False)
    for name, linear in linears(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, TunedLinear(linear, rank, bits))
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def wanda(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Prune half of each output row of every linear layer by |W| times the norm of its input, block by block.

    A block is calibrated on what the blocks before it, already pruned, give.
    """
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    for block in model.model.layers:
        norms: dict[nn.Linear, Tensor] = {}

        def add_square(linear: nn.Linear, inputs: tuple[Tensor], norms: dict[nn.Linear, Tensor] = norms) -> None:
            norms[linear] = norms.get(linear, torch.zeros(())) + inputs[0].flatten(0, -2).square().sum(0)

        layers = list(linears(block).values())
        hooks = [layer.register_forward_pre_hook(add_square) for layer in layers]
        for row in rows:
            model(input_ids=row)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            scores = layer.weight.abs() * norms[layer].sqrt()
            drop = scores.argsort(dim=1)[:, : scores.shape[1] // 2]
            layer.weight.scatter_(1, drop, 0.0)


def batch_of(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Prompts and continuations as one padded batch; the labels are the continuations' tokens only."""
    width = max(len(a) + len(b) for a, b in rows)
    fill = [width - len(a) - len(b) for a, b in rows]
    each = list(zip(rows, fill, strict=True))
    return {
        "input_ids": torch.tensor([a + b + [pad] * n for (a, b), n in each]),
        "attention_mask": torch.tensor([[1] * (len(a) + len(b)) + [0] * n for (a, b), n in each]),
        "labels": torch.tensor([[-100] * len(a) + b + [-100] * n for (a, b), n in each]),
    }


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parameters: list[nn.Parameter],
    records: Sequence[Record], *, lr: float, seed: int,
) -> float:  # fmt: skip
    """Train on the answers to the prompts with a one-cycle cosine; returns its seconds of processor time."""
    rng, started = Random(seed), time.process_time()
    end, pad = special(tokenizer)
    rows = [(encode(tokenizer, r["prompt"]), [*encode(tokenizer, r["answer"]), end]) for r in records]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=STEPS, pct_start=0.1)
    model.train()
    for _ in range(STEPS):
        loss = model(**batch_of(rng.sample(rows, BATCH), pad)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return time.process_time() - started


def special(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids of the end and of padding."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(end, int)
    assert isinstance(pad, int)
    return end, pad


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, none added."""
    return tokenizer(text)["input_ids"]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Of each (prompt, continuation): the continuation's log-likelihood and its number of tokens scored."""
    (end, pad), totals, counts = special(tokenizer), [], []
    for start in range(0, len(pairs), 250):
        rows = [(encode(tokenizer, a) or [end], encode(tokenizer, b)) for a, b in pairs[start : start + 250]]
        batch = batch_of(rows, pad)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        totals.append(-losses.sum(1))
        counts.append((labels != -100).sum(1))
    return torch.cat(totals), torch.cat(counts)


@torch.no_grad()
def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, split: str = "test") -> float:
    """A task's figure: per cent right, or perplexity."""
    kind, records = task(name).kind, task(name).split(split)
    if kind == "generation":
        right = 0
        for start in range(0, len(records), 250):
            some = records[start : start + 250]
            inputs = tokenizer([r["prompt"] for r in some], padding=True, padding_side="left", return_tensors="pt")
            out = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5
            )
            told = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(t.strip() == r["answer"].strip() for t, r in zip(told, some, strict=True))
        return 100 * right / len(records)
    if kind == "choice":
        totals, _ = log_likelihoods(model, tokenizer, [(r["prompt"], c) for r in records for c in r["choices"]])
        per_record = totals.split([len(r["choices"]) for r in records])
        return 100 * sum(int(t.argmax()) == r["label"] for t, r in zip(per_record, records, strict=True)) / len(records)
    if kind == "pairs":
        totals, _ = log_likelihoods(model, tokenizer, [("", r[k]) for r in records for k in ("good", "bad")])
        return 100 * float((totals[0::2] > totals[1::2]).float().mean())
    totals, counts = log_likelihoods(model, tokenizer, [("", r["text"]) for r in records])
    return math.exp(-float(totals.sum() / counts.sum()))


class Playground:
    """The model, fresh for each measurement, and how each row of the table is made of it."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.base = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        self.problems = task("word_problems").split("train")

    def pruned(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy with half the weights pruned, calibrated on solved word problems."""
        copied = copy.deepcopy(model)
        wanda(copied, self.tokenizer, [r["prompt"] + r["answer"] for r in self.problems[:128]])
        return copied

    def full(self, seed: int) -> tuple[PreTrainedModel, float]:
        """Every weight tuned; and the seconds."""
        model = copy.deepcopy(self.base)
        return model, train(model, self.tokenizer, list(model.parameters()), self.problems, lr=FULL_LR, seed=seed)

    def lora(self, seed: int, *, prune: bool = False, bits: int = 0) -> tuple[PreTrainedModel, float]:
        """LoRA of rank 16 on the dense or pruned model; with bits, on the grid of that model quantized."""
        torch.manual_seed(seed)
        model = self.pruned(self.base) if prune else copy.deepcopy(self.base)
        parameters = add_lora(model, bits=bits)
        return model, train(model, self.tokenizer, parameters, self.problems, lr=LORA_LR, seed=seed)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the seeds."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def base_table(play: Playground) -> list[str]:
    """What the base can do before any tuning, and after pruning half of it."""
    lines = ["| task | base | base, Wanda 50% |", "|---|---:|---:|"]
    pruned = play.pruned(play.base)
    for name in TASKS:
        if task(name).kind != "classification":  # needs a head, which the base has not
            scores = [f"{score(model, play.tokenizer, name):.1f}" for model in (play.base, pruned)]
            lines.append(f"| {name} ({task(name).metric}) | {' | '.join(scores)} |")
    return lines


def tuned_scores(directory: Path, seed: int) -> dict[str, tuple[float, float]]:
    """Word problems after tuning in each way with this seed: exact match, and the seconds of training."""
    torch.set_num_threads(1)
    play = Playground(directory)
    rows: dict[str, tuple[float, float]] = {}

    def note(row: str, model: PreTrainedModel, seconds: float) -> None:
        rows[row] = (score(model, play.tokenizer, "word_problems"), seconds)

    model, seconds = play.full(seed)
    note("full fine-tuning", model, seconds)
    note("full fine-tuning, then Wanda 50%", play.pruned(model), seconds)
    note("LoRA r=16", *play.lora(seed))
    note("Wanda 50%, LoRA r=16 in the mask", *play.lora(seed, prune=True))
    note("Wanda 50%, INT4, LoRA r=16 in the mask and on the grid", *play.lora(seed, prune=True, bits=4))
    return rows


def tuned_table(directory: Path, seeds: range, jobs: int) -> list[str]:
    """The rows of `tuned_scores` over the seeds, `jobs` of them at a time."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        results = pool.map(tuned_scores, [directory] * len(seeds), seeds)
        per_seed = list(track(results, "tuning, by seed", total=len(seeds)))
    lines = ["| word_problems | exact match | seconds |", "|---|---:|---:|"]
    for row in per_seed[0]:
        seconds = statistics.mean(scores[row][1] for scores in per_seed)
        lines.append(f"| {row} | {spread([scores[row][0] for scores in per_seed])} | {seconds:.0f} |")
    return lines


def write(page: Path, lines: Sequence[str]) -> None:
    """Put the lines between the page's markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, *lines, END + after]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="seeds measured at a time, one thread each")
    parser.add_argument("--page", type=Path, help="write the tables into this page, between its markers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [*base_table(Playground(arguments.model)), ""]
    lines += tuned_table(arguments.model, range(arguments.seeds), arguments.jobs)
    print("\n".join(lines))
    if arguments.page:
        write(arguments.page, lines)


if __name__ == "__main__":
    main()
