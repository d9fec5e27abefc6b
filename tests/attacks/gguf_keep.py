"""Hostile GGUF files, loaded with grid="keep": a DovetailError, or what the gguf package reads from the same bytes.

    python tests/attacks/gguf_keep.py --files 1000 --seed 0

A change is one to three edits of the header (counts, lengths, types, shapes, offsets, keys), of scales or codes, or a
cut. Memory must stay within 100 MB of what the process had before.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.config import empty_model, load_config
from dovetail.checkpoint.formats.gguf.header import read_header
from dovetail.checkpoint.formats.gguf.names import Names, linear_tensors
from dovetail.checkpoint.load import load
from dovetail.errors import DovetailError
from families import make
from gguf_files import write_gguf

ROOM = 100_000
"""Kilobytes that all files together may take."""
_NUMBERS = (0, 1, 2, 3, 31, 32, 33, 64, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def spoil(content: bytes, pick: random.Random) -> bytes:
    """Return a changed file: numbers and bits of its header, bytes of its tensors, or a cut."""
    found = bytearray(content)
    header = content.index(b"output_norm.weight") + 64
    for _ in range(pick.randint(1, 3)):
        kind = pick.randrange(6)
        if kind == 0:
            at = pick.randrange(4, header, 4)
            struct.pack_into("<I", found, at, pick.choice(_NUMBERS) % 2**32)
        elif kind == 1:
            at = pick.randrange(4, header)
            struct.pack_into("<Q", found, at, pick.choice(_NUMBERS))
        elif kind == 2:
            at = pick.randrange(header)
            found[at] ^= 1 << pick.randrange(8)
        elif kind == 3:  # a number behind a tensor's name: dimensions, type, offset
            name = pick.choice([b"attn_q.weight", b"ffn_up.weight", b"attn_norm.weight", b"token_embd.weight"])
            at = content.index(name) + len(name) + pick.choice([0, 4, 12, 20, 24])
            struct.pack_into("<I", found, at, pick.choice((*_NUMBERS, *range(40))) % 2**32)
        elif kind == 4:
            at = pick.randrange(header, len(found) - 2)
            found[at : at + 2] = pick.choice([b"\xff\x7c", b"\x00\x7c", b"\xff\xff", pick.randbytes(2)])
        else:
            del found[pick.randrange(len(found)) :]
            break
    return bytes(found)


def meet(path: Path) -> str:
    """Load a file, and return the name of its error; AssertionError for values that are not the file's."""
    try:
        model, _ = load(path, grid="keep")
    except DovetailError as error:
        return type(error).__name__
    header = read_header(path)
    empty = empty_model(load_config(path))
    places = linear_tensors(header, empty, Names(header, empty))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, layer in chain_layers(model).items():
        tensor = stored[places[name].name]
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        rows = places[name].rows
        values = values.view(layer.base.shape) if rows is None else values.view(layer.base.shape)[rows]
        assert torch.equal(layer.base.matrix().float(), values), name
    return "the file's own values"


def attack(files: int, seed: int = 0) -> Counter[str]:
    """Load that many changed files, and count what came of them."""
    pick, found = random.Random(seed), Counter[str]()
    kinds = gguf.GGMLQuantizationType
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "changed.gguf"
        given = {"attn_q": kinds.Q5_0, "ffn_up": kinds.Q8_0, "ffn_down": kinds.Q4_1}
        content = write_gguf(make("llama"), path, "llama", kinds.Q4_0, kinds=given).read_bytes()
        assert meet(path) == "the file's own values"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(files):
            path.write_bytes(spoil(content, pick))
            try:
                found[meet(path)] += 1
            except BaseException:
                print(f"file {number} of seed {seed}", file=sys.stderr)
                raise
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < ROOM, f"file {number} of seed {seed} took {grown} kB"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(dict(attack(asked.files, asked.seed)))
