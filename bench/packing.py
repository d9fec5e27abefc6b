"""Tokens a second of training with packed rows, with rows of similar length together, and with rows in random order.

    python bench/packing.py [--rounds 5] [--json]

A random Llama (4 layers, 256 wide) with lora(r=8), one thread; 512 rows with the lengths of Alpaca (log-normal, median
85 tokens, sigma 0.65, from 30 to 512). Rows in random order are padded to the longest of their batch, which is what
most trainers do. A packed batch of 2 rows of 512 tokens holds about as many texts as a batch of 10 rows. Each epoch is
timed whole, in interleaved rounds, by processor time; tokens are those of the texts, padding is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail
from dovetail.tasks.packing import PackedRows
from dovetail.tasks.tokens import IGNORED, Collator, Example
from dovetail.training.trainer import BatchOrder

MAX_LENGTH, ROWS = 512, 512
WAYS = {"random order": 10, "similar lengths": 10, "packed": 2}
"""Way of batching -> rows of a batch."""


def rows_like_alpaca() -> list[Example]:
    random = Random(0)
    rows = []
    for _ in range(ROWS):
        length = min(MAX_LENGTH, max(30, round(random.lognormvariate(4.44, 0.65))))
        ids = [random.randrange(3, 1000) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    return rows


def batches(way: str, rows: list[Example]) -> list[dict[str, torch.Tensor]]:
    chosen = rows if way != "packed" else PackedRows(rows, [len(row["input_ids"]) for row in rows], MAX_LENGTH)
    size = WAYS[way]
    lengths = [len(row["input_ids"]) for row in chosen]
    order = list(BatchOrder(lengths, batch_size=size, step_rows=size, grouped=way != "random order", seed="0"))
    return [Collator(0)([chosen[row] for row in order[at : at + size]]) for at in range(0, len(order), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    model = dovetail.apply(LlamaForCausalLM(config), "lora(r=8)").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    rows = rows_like_alpaca()
    tokens = sum(len(row["input_ids"]) for row in rows)
    made = {way: batches(way, rows) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, epoch in made.items():
            start = time.process_time()
            for batch in epoch:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            seconds[way].append(time.process_time() - start)
    found = {}
    for way, epoch in made.items():
        computed = sum(batch["input_ids"].numel() for batch in epoch)
        rate = tokens / statistics.median(seconds[way])
        found[way] = {"tokens_per_second": round(rate), "padding": 1 - tokens / computed, "steps": len(epoch)}
    base = found["random order"]["tokens_per_second"]
    if arguments.json:
        print(json.dumps(found))
        return
    for way, row in found.items():
        ratio = row["tokens_per_second"] / base
        print(
            f"{way:16} {row['tokens_per_second']:7} tokens/s  {ratio:.2f}x  {row['padding']:.0%} padding, "
            f"{row['steps']} steps"
        )


if __name__ == "__main__":
    main()
