"""Experts: sizes beside the entropy; selection, coding, decoding and mask arithmetic beside what tensors would cost.

    OMP_NUM_THREADS=1 python bench/experts.py [--log2 26] [--rounds 5] [--json]

2^26 (64 Mi) values, one thread, processor time, medians of interleaved rounds. Targets are ratios: ours over the peer.

Mask dot and torch.dot are both as fast as memory, of which masks take 2 bits for 32: that ratio is 1/16 at best where
neither is in a cache, as here after the peer has run.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from dovetail import experts
from dovetail.experts.codec.codec import code, decode_dense, decode_masks
from dovetail.experts.masks import dot
from dovetail.experts.ternary import top_k
from timing import Row, medians, show


def entropy(density: float) -> float:
    """Bits a value of independent ternary values with equally likely signs (ComPEFT §2.2)."""
    return -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)


def draw(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def sizes(count: int) -> list[Row]:
    """Whole files; in KiB where others are in milliseconds."""
    rows = []
    plain = draw(count, 0).bfloat16()
    for density, target in ((0.01, 1.03), (0.05, 1.02), (0.1, 1.02), (0.2, 1.02), (0.5, 1.02)):
        made = experts.compress({"w": plain}, density)
        least = count * entropy(density) / 8
        rows.append(Row(f"density {density:g}, i.i.d.", made.nbytes / 1024, least / 1024, target))
    scaled = draw(count, 0).view(-1, 4096) * draw(count // 4096, 1).exp()[:, None]
    made = experts.compress({"w": scaled.bfloat16()}, 0.05)
    rows.append(Row("density 0.05, rows lognormal", made.nbytes / 1024, count * entropy(0.05) / 8 / 1024, 0.70))
    return rows


def selection(count: int, rounds: int) -> list[Row]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        vector = draw(count, 0).to(dtype)
        magnitudes, rank = vector.abs(), count - round(0.05 * count) + 1
        times = medians(
            {
                "ours": lambda vector=vector: top_k({"w": vector}, 0.05),
                "peer": lambda magnitudes=magnitudes, rank=rank: torch.kthvalue(magnitudes, rank),
            },
            rounds,
            warmup=1,
        )
        name = f"top-k, {str(dtype).removeprefix('torch.')} / torch.kthvalue"
        rows.append(Row(name, times["ours"], times["peer"], 1 / 20))
    return rows


def codec(count: int, rounds: int) -> list[Row]:
    vector = draw(count, 0).bfloat16()
    out = torch.empty_like(vector)
    coded, masks = {}, {}
    for density in (0.05, 0.2):
        masks[density] = top_k({"w": vector}, density).masks["w"]
        coded[density] = code(masks[density], (count,))
    bits = masks[0.05].copy()
    times = medians(
        {
            "memcpy": lambda: out.copy_(vector),
            "select, encode": lambda: code(top_k({"w": vector}, 0.05).masks["w"], (count,)),
            "dense 0.05": lambda: decode_dense(coded[0.05], out, 0.5, "w"),
            "dense 0.2": lambda: decode_dense(coded[0.2], out, 0.5, "w"),
            "masks 0.05": lambda: decode_masks(coded[0.05], bits, 0, "w"),
        },
        rounds,
        warmup=1,
    )
    aims = {"select, encode": 8.0, "dense 0.05": 1.6, "dense 0.2": 3.0, "masks 0.05": 1.0}
    return [Row(f"{name} / memcpy", times[name], times["memcpy"], aim) for name, aim in aims.items()]


def arithmetic(count: int, rounds: int) -> list[Row]:
    vectors = [draw(count, seed) for seed in range(2)]
    masks = [experts.compress({"w": draw(count, seed)}, 0.05, 1 + seed / 10).masks() for seed in range(4)]
    times = medians(
        {"ours": lambda: dot(masks[0], masks[1]), "peer": lambda: torch.dot(vectors[0], vectors[1])}, 4 * rounds
    )
    rows = [Row("mask dot / torch.dot float32", times["ours"], times["peer"], 1 / 25)]
    dense = [vector.bfloat16() for vector in (*vectors, draw(count, 2), draw(count, 3))]
    times = medians(
        {
            "ours": lambda: experts.elect(masks),
            "peer": lambda: torch.sign(dense[0] + dense[1] + dense[2] + dense[3]),
        },
        rounds,
        warmup=1,
    )
    return [*rows, Row("TIES election of 4 / dense bfloat16", times["ours"], times["peer"], 1 / 15)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log2", type=int, default=26)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count = 1 << arguments.log2
    show("file / entropy (KiB, not ms)", sizes(count), arguments.json)
    show("selection", selection(count, arguments.rounds), arguments.json)
    show("codec", codec(count, arguments.rounds), arguments.json)
    show("masks", arithmetic(count, arguments.rounds), arguments.json)


if __name__ == "__main__":
    main()
