"""Hostile expert files: changed, cut and forged ones give a DovetailError or the right answer, and nothing else.

    python tests/attacks/run.py --files 200000 --seed 0

Half of the changes leave the checksums as they were: such a file must be refused, or hold exactly what it held. The
other half repairs every checksum behind it, as someone would who means harm: such a file must be refused, or decode to
what its own directory says, the same by every way of decoding, and now and then by the reader that was written from
docs/format.md alone. A crash ends the process, and so does a file that takes a minute. Of every file, memory must stay
within twice what it declares, and what a reader needs for any.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dovetail import experts
from dovetail.errors import DovetailError
from dovetail.experts.codec.codec import ENTRY
from dovetail.experts.codec.native import crc32c

sys.path.insert(0, str(Path(__file__).parents[1]))

import expert_reader

LARGEST = 1 << 22  # values: of forged files that declare more, only the header is read
SECONDS = 60  # that no file may take
ROOM = 8 << 20  # bytes that reading any file may take: the file, its header as objects, a block's scratch


class File:
    """An expert's file, in parts that can be changed one by one."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        container = json.loads(data[8 : 8 + length])
        cut = 8 + length + container["directory"]["shape"][0]
        self.header: Any = json.loads(container["__metadata__"]["dovetail"])
        self.directory = np.frombuffer(data[8 + length : cut], ENTRY).copy()
        lengths = [int(n) for n in self.directory["length"]]
        starts = [cut + sum(lengths[:i]) for i in range(len(lengths))]
        self.blocks = [data[at : at + n] for at, n in zip(starts, lengths, strict=True)]

    def bytes(self, container: Callable[[dict[str, Any]], None] = lambda _: None) -> bytes:
        """The file with every checksum and size as its parts need it."""
        for entry, block in zip(self.directory, self.blocks, strict=False):
            entry["crc32c"] = crc32c(block)
        text, directory, blocks = json.dumps(self.header), self.directory.tobytes(), b"".join(self.blocks)
        a, b = len(directory), len(directory) + len(blocks)
        said: dict[str, Any] = {
            "__metadata__": {"dovetail": text, "crc32c": f"{crc32c(text.encode() + directory):08x}"},
            "directory": {"dtype": "U8", "shape": [a], "data_offsets": [0, a]},
            "blocks": {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]},
        }
        container(said)
        head = json.dumps(said).encode()
        return len(head).to_bytes(8, "little") + head + directory + blocks


def corpus() -> list[experts.Expert]:
    """Small experts with every mode, order and scale."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 256, generator=generator) * torch.exp(1.5 * torch.randn(300, 1, generator=generator))
    tall = torch.randn(2000, 8, generator=generator) * torch.exp(2 * torch.randn(8, generator=generator))
    mixed = {
        "rows": rows,
        "tall": tall,
        "none": torch.zeros(70000),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(9.0),
    }
    plain = {"w": torch.randn(66000, generator=generator), "v": torch.randn(40, 50, generator=generator).bfloat16()}
    peft: dict[str, Any] = {"r": 8, "target_modules": ["q", "v"]}
    return [
        experts.compress(mixed, 0.05, base="sha256:" + "0" * 64, origin=experts.Origin(chain="lora(r=8)")),
        experts.compress(plain, 0.2, 2.0, "tensor", origin=experts.Origin(peft=peft)),
        experts.compress(plain, 0.5),
        experts.compress(plain, 1.0),
        experts.compress({"w": torch.ones(3)}, 0.5),
    ]


def spoil(data: bytes, rng: random.Random) -> bytes:
    """A change without repairs."""
    out, kind = bytearray(data), rng.randrange(7)
    length = int.from_bytes(data[:8], "little")
    near = rng.choice([8, 8 + length, len(data)])  # what lies in front is rarely large, but matters most
    at, other = rng.randrange(near), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        for _ in range(rng.randint(1, 8)):
            out[rng.randrange(near)] ^= 1 << rng.randrange(8)
    elif kind == 2:
        size = rng.randint(1, 64)
        out[at : at + size] = rng.choice([bytes(size), rng.randbytes(size), b"\xff" * size])
    elif kind == 3:
        size = rng.choice([1, 9, 9, 18, 100])
        out[at : at + size], out[other : other + size] = data[other : other + size], data[at : at + size]
    elif kind == 4:
        out[at:at] = rng.randbytes(rng.randint(1, 20))
    elif kind == 5:
        del out[at : at + rng.randint(1, 20)]
    else:
        digits = [i for i in range(8, 8 + length) if 48 <= data[i] < 58]
        out[rng.choice(digits)] = rng.choice(b'0123456789-.eE"[{')
    return bytes(out)


HUGE = [2**16, 2**31 - 1, 2**32, 2**48, 2**48 + 1, 2**63, 2**64, 10**30, -1, 1.5, "7", None, True, [], 1e400]


def forge(data: bytes, rng: random.Random) -> bytes:
    """A change with every checksum repaired."""
    file, kind = File(data), rng.randrange(8)
    place = rng.randrange(len(file.blocks))
    entry = file.directory[place : place + 1]
    if kind == 0 and file.blocks[place]:
        block = bytearray(file.blocks[place])
        for _ in range(rng.choice([1, 2, 16, 200])):
            block[min(int(rng.random() ** 2 * len(block)), len(block) - 1)] ^= 1 << rng.randrange(8)
        file.blocks[place] = bytes(block)
    elif kind == 1:
        field, most = rng.choice([("count", 65536), ("mode", 256), ("count", 70), ("mode", 4)])
        entry[field] = rng.choice([rng.randrange(most), int(entry[field][0]) ^ 1 << rng.randrange(8)])
    elif kind == 2:
        size = rng.choice([0, 1, 8, 33, 16384, 16385, 65535, len(file.blocks[place]) + rng.randint(-9, 9)])
        size = max(size, 0)
        file.blocks[place] = (file.blocks[place] + rng.choice([bytes(65535), rng.randbytes(65535)]))[:size]
        entry["length"] = size
    elif kind == 3:
        entry["length"] = rng.choice([0, 16384, 65535, rng.randrange(65536)])
    elif kind == 4:
        swapped = rng.randrange(len(file.blocks))
        file.directory[[place, swapped]] = file.directory[[swapped, place]]
        if rng.random() < 0.5:
            file.blocks[place], file.blocks[swapped] = file.blocks[swapped], file.blocks[place]
    elif kind == 5:
        _edit(file.header, rng)
    elif kind == 6:
        keep = rng.choice([0, 1, len(file.directory) - 1, 2 * len(file.directory), 3000])
        file.directory = np.resize(file.directory, keep)
        if rng.random() < 0.5:
            file.directory[:] = 0
            file.blocks = []
            for tensor in file.header["tensors"][:1]:
                tensor["shape"] = rng.choice([[keep * 65536], [keep, 65536], [2**24, 2**24, 2**24], [0, 2**62]])
    else:

        def change(container: dict[str, Any]) -> None:
            part = container[rng.choice(["directory", "blocks"])]
            part[rng.choice(["shape", "data_offsets"])][0] = rng.choice(HUGE)

        def nest(container: dict[str, Any]) -> None:
            depth = rng.choice([100, 10_000])
            container["__metadata__"]["dovetail"] = "[" * depth + rng.choice(["", "]" * depth])

        def add(container: dict[str, Any]) -> None:
            container[rng.choice(["x", "__metadata__"])] = rng.choice(
                [{}, {"dovetail": "1"}, [[]] * 1000, "x" * 100000]
            )

        return file.bytes(rng.choice([change, nest, add]))
    return file.bytes()


def _edit(header: Any, rng: random.Random) -> None:
    kind = rng.randrange(6)
    tensor = rng.choice(header["tensors"])
    if kind == 0:
        tensor["shape"] = [rng.choice([*HUGE, 0, 3]) for _ in range(rng.choice([1, 2, 3, 65]))]
    elif kind == 1:
        tensor[rng.choice(["name", "dtype", "order", "shape", "else"])] = rng.choice([*HUGE, "columns", "x" * 501, "w"])
    elif kind == 2:
        header["scales"] = rng.choice([[], [rng.choice(HUGE)], [1e308] * 2, [float("nan")], header["scales"] * 2])
    elif kind == 3:
        header[rng.choice(["version", "format", "scale", "density", "alpha", "base", "peft"])] = rng.choice(HUGE)
    elif kind == 4:
        header["tensors"] = rng.choice([[], header["tensors"][::-1], header["tensors"] * 2, [tensor] * 1000])
    else:
        header[rng.choice(["else", "provenance"])] = {"x": [[]] * 100}


def answer(expert: experts.Expert) -> dict[str, torch.Tensor]:
    """What an expert decodes to, the same in every way."""
    dense = expert.dense(torch.float32, threads=1)
    masks = expert.masks(threads=1)
    ones = experts.scaled_sum([masks])
    for name, tensor in dense.items():
        assert tensor.shape == expert.coded[name].shape
        assert torch.equal(tensor, ones[name]), name
    assert masks.kept == expert.kept
    return dense


def read_by_the_document(path: Path, expert: experts.Expert) -> None:
    """The other reader finds the same signs; a forged scale, of which numbers are made, may be negative or 0."""
    for name, signs in expert_reader.read(path)[1].items():
        at, ours = expert.indices(name)
        found = torch.zeros(expert.coded[name].numel, dtype=torch.int8).index_put_((at,), ours)
        assert found.tolist() == signs, name


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` that it has, `VmHWM` that it had at most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def forget_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, which would hide later requests
    Path("/proc/self/clear_refs").write_text("5")


def attack(files: int, seed: int = 0) -> Counter[str]:
    """Count how files were met. AssertionError for the first that was met wrongly."""
    rng, met = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.dvt"
        whole = []
        for expert in corpus():
            expert.save(path)
            whole.append((path.read_bytes(), answer(experts.load(path))))
        for _ in range(files):
            data, right = rng.choice(whole)
            forged = rng.random() < 0.5
            path.write_bytes((forge if forged else spoil)(data, rng))
            met[meet(path, None if forged else right, rng.random() < 0.02)] += 1
    return met


def meet(path: Path, right: dict[str, torch.Tensor] | None, twice: bool) -> str:
    """Reads a file, and says how that went.

    right  what it must hold where its checksums are the old ones; None: forged
    twice  whether the other reader is asked as well
    """
    forget_peak()
    before, declared = memory("VmRSS"), 0
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        expert = experts.load(path)
        found = None
        if expert.numel <= LARGEST:
            declared = expert.numel * (4 + 4) + expert.numel // 4  # dense, sum and masks
            found = answer(expert)
        how = "read"
    except DovetailError:
        found, how = None, "refused"
    finally:
        faulthandler.cancel_dump_traceback_later()
        grown = memory("VmHWM") - before
    assert grown <= 2 * declared + ROOM, f"memory grew by {grown} bytes, {declared} are declared"
    if right is not None and how == "read":
        assert found is not None
        assert list(found) == list(right)
        assert all(torch.equal(found[name], tensor) for name, tensor in right.items())
    if right is None and found is not None and twice and expert.numel <= 1 << 18:
        read_by_the_document(path, expert)
    return f"{how}, {'forged' if right is None else 'changed' if how == 'refused' else 'unchanged'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    met = attack(files=arguments.files, seed=arguments.seed)
    for what, count in sorted(met.items()):
        print(f"{count:8d} {what}")
    took = time.monotonic() - start
    print(f"{met.total():8d} files in {took:.0f} s: no crash, no hang, no wrong answer, memory in bounds")


if __name__ == "__main__":
    main()
