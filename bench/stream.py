"""A checkpoint of random weights, compressed with its weights on disk: peak memory, time, kills, and the bits.

    python bench/stream.py make FOLDER [--size 1.1B] [--dtype float32] [--layers 22]
    python bench/stream.py run FOLDER CHAIN OUTPUT [--rows 32] [--tokens 512]
    python bench/stream.py memory FOLDER CHAIN OUTPUT       # the same in memory: load, apply, merge, save_packed
    python bench/stream.py kill FOLDER CHAIN OUTPUT [--kills 10]
    python bench/stream.py same ONE OTHER                   # two packed folders, file by file and tensor by tensor

`run` prints the highest resident memory beyond that of the interpreter, which has compressed a tiny
model before, and the time. `kill` starts
`run` again after each SIGKILL: at a random time (at most --most seconds) after a random number of blocks (at most
--blocks).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "warm": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 64},
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 2048},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 32000},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def make(folder: Path, size: str, dtype: str, layers: int | None = None) -> None:
    """Write a random Llama, one shard a block."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**SIZES[size], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.dtype, config.architectures = getattr(torch, dtype), ["LlamaForCausalLM"]
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else parts[-2], {})[name] = tensor.shape
    index = {}
    for number, shard in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shard.items():
            values = torch.randn(shape, generator=generator)
            values = (0.5 * values).exp() if "norm" in name else 0.02 * values
            tensors[name], index[name] = values.to(config.dtype), file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def batches(folder: Path, rows: int, tokens: int) -> list[dict[str, Any]]:
    """Token ids (rows, tokens), some far more frequent than others."""
    import torch

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    drawn = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = (vocabulary**drawn).long().clamp(4, vocabulary - 1)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]


def status(key: str) -> int:
    """Return a number of bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def run(folder: Path, chain: str, output: Path, rows: int, tokens: int, *, on_disk: bool) -> None:
    import torch

    import dovetail

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as warm:  # what is imported and compiled is part of the interpreter's own memory
        make(Path(warm) / "model", "warm", "float32")
        few = batches(Path(warm) / "model", 2, 64)
        dovetail.compress(Path(warm) / "model", chain, Path(warm) / "packed", calibration=few)
    data = batches(folder, rows, tokens)
    before, start, work = status("VmRSS"), time.perf_counter(), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    found = len(list(output.with_name(f".{output.name}.work").glob("link*")))
    if on_disk:
        report = dovetail.compress(folder, chain, output, calibration=data, progress=True)
        merged = report.merge
    else:
        model, tokenizer = dovetail.load(folder)
        dovetail.apply(model, chain, calibration=data, progress=True)
        merged = dovetail.merge(model, packed=True)
        dovetail.save_packed(model, output, tokenizer=tokenizer)
    print(json.dumps({
        "chain": chain, "on_disk": on_disk, "peak_GB": (status("VmHWM") - before) / 1e9, "interpreter_GB": before / 1e9,
        "seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - work, "found": found,
        "exact": merged.exact, "logits": merged.max_abs_logit_diff, "zeros": merged.sparsity_after,
    }), flush=True)  # fmt: skip


def kill(folder: Path, chain: str, output: Path, arguments: argparse.Namespace) -> None:
    """Run with kills, each at a random time after a random number of blocks; print the finished ones before and after.

    A block is a file; a start that was killed has lost the one that it was in.
    """
    drawn = random.Random(arguments.seed)
    work = output.with_name(f".{output.name}.work")
    command = [sys.executable, __file__, "run", str(folder), chain, str(output)]
    command += ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
    for number in range(arguments.kills + 1):
        before, start = sorted(path.stem for path in work.glob("link*")), time.perf_counter()
        process = subprocess.Popen(command)
        if number < arguments.kills:
            new = drawn.randrange(arguments.blocks + 1)
            while process.poll() is None and len({path.stem for path in work.glob("link*")} - set(before)) < new:
                time.sleep(0.05)
            with suppress(subprocess.TimeoutExpired):
                process.wait(drawn.uniform(0, arguments.most))
            process.kill()
        process.wait()
        after = sorted(path.stem for path in work.glob("link*"))
        print(json.dumps({
            "start": number, "killed": process.returncode == -signal.SIGKILL, "seconds": time.perf_counter() - start,
            "found": before, "left": after,
        }), flush=True)  # fmt: skip
        if process.returncode == 0:
            break


def same(one: Path, other: Path) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(one / "packed.safetensors", "pt") as a, safe_open(other / "packed.safetensors", "pt") as b:
        if a.keys() != b.keys() or a.metadata() != b.metadata():
            sys.exit("other tensors, or another header")
        different = [key for key in a.keys() if not torch.equal(a.get_tensor(key), b.get_tensor(key))]  # noqa: SIM118
    names = {path.name for folder in (one, other) for path in folder.iterdir()} - {"packed.safetensors"}
    different += [name for name in sorted(names) if (one / name).read_bytes() != (other / name).read_bytes()]
    print(json.dumps({"equal": not different, "different": different[:5]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("make", "run", "memory", "kill", "same"))
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int)
    for name, value in (("rows", 32), ("tokens", 512), ("kills", 10), ("seed", 0), ("blocks", 3), ("most", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    if asked.job == "make":
        make(Path(asked.paths[0]), asked.size, asked.dtype, asked.layers)
    elif asked.job == "same":
        same(Path(asked.paths[0]), Path(asked.paths[1]))
    else:
        folder, chain, output = asked.paths
        if asked.job == "kill":
            kill(Path(folder), chain, Path(output), asked)
        else:
            run(Path(folder), chain, Path(output), asked.rows, asked.tokens, on_disk=asked.job == "run")


if __name__ == "__main__":
    main()
