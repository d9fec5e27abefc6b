"""Calibrated compression of a whole model beside llm-compressor: processor time, peak memory, error of the result.

    python bench/compress.py [--peer PEER/bin/python] [--rounds 3] [--methods gptq,wanda,sparsegpt] [--json]

A random Llama (1024 wide, 8 layers) and the same calibration ids for both; 4 bits in groups of 128 with act-order, half
the weights pruned. Without --peer, ours alone. llm-compressor brings its own transformers and so needs an interpreter
of its own:
    python -m venv PEER && PEER/bin/pip install llmcompressor==0.14.0.1 torch==2.13.0

Each measurement is a process of its own, one thread, rounds interleaved. Time is the processor's, of `dovetail.apply`
or of `oneshot` alone, without imports, loading and saving; medians. llm-compressor runs as its users call it: its
sequential pipeline and defaults, one sample at a time (--peer-batch for more). Memory is measured in a further run: the
most bytes of tensors alive (`PeakMemory`, on both sides) beyond the model's own, in units of a block's bytes.
Error is that of the final hidden states on ids that calibration didn't see, ‖h - h'‖² / ‖h‖².
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AIM_TIME, AIM_MEMORY = 1.5, 2.0
CHAINS = {"gptq": "gptq(bits=4, group=128, symmetric=True)", "wanda": "wanda(0.5)", "sparsegpt": "sparsegpt(0.5)"}


def make_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Saves a random Llama whose norms are uneven, as trained ones are: else every input would matter the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary, hidden_size=arguments.hidden, num_hidden_layers=arguments.layers,
        intermediate_size=arguments.intermediate, num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_((0.5 * torch.randn_like(parameter)).exp())
    model.to(getattr(torch, arguments.dtype)).save_pretrained(folder)


def make_ids(arguments: argparse.Namespace, seed: int) -> Tensor:
    """Token ids (samples, tokens), some far more frequent than others."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(arguments.samples, arguments.tokens, generator=generator, dtype=torch.float64)
    return (arguments.vocabulary**drawn).long() - 1


def ours(model: Any, ids: Tensor, method: str) -> Callable[[], object]:
    import dovetail

    batches = [{"input_ids": part} for part in ids.split(8)]
    return lambda: dovetail.apply(model, CHAINS[method], calibration=batches)


def theirs(model: Any, ids: Tensor, method: str, batch: int) -> Callable[[], object]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from loguru import logger
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    logger.remove()
    if method == "gptq":
        recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    else:
        modifier = WandaPruningModifier if method == "wanda" else SparseGPTModifier
        recipe = modifier(sparsity=0.5, ignore=["re:.*lm_head"])
    rows = ids.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    # Asked for, though the ids are made already.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a")
    return lambda: oneshot(
        model=model, processor=tokenizer, dataset=data, recipe=recipe, batch_size=batch, max_seq_length=ids.shape[1],
        num_calibration_samples=len(rows), shuffle_calibration_samples=False,
    )  # fmt: skip


@torch.no_grad()
def hidden(model: Any, ids: Tensor) -> Tensor:
    """Final hidden states, float32."""
    return torch.cat([model.model(input_ids=part).last_hidden_state.float() for part in ids.split(4)])


def work(arguments: argparse.Namespace) -> None:
    """One measurement, in a process of its own; prints its numbers as the last line."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype)).eval()
    ids, others = make_ids(arguments, 1), make_ids(arguments, 2)[:8]
    before = hidden(model, others)
    method = arguments.methods
    call = ours(model, ids, method) if arguments.work == "ours" else theirs(model, ids, method, arguments.peer_batch)
    tensors = [*model.parameters(), *model.buffers()]
    model_nbytes = sum(tensor.nbytes for tensor in tensors)
    block_nbytes = sum(tensor.nbytes for tensor in model.model.layers[0].parameters())
    memory = peak_memory(tensors) if arguments.memory else nullcontext()
    del tensors
    with memory, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        start = time.process_time()
        call()
        seconds = time.process_time() - start
    found: dict[str, float] = {"seconds": seconds}
    if arguments.memory:
        found["memory_blocks"] = (memory.peak_nbytes - model_nbytes) / block_nbytes
        found["kept_blocks"] = ids.numel() * arguments.hidden * before.element_size() / block_nbytes
    else:
        found["error"] = float((hidden(model, others) - before).square().sum() / before.square().sum())
    print(json.dumps(found))


def peak_memory(tensors: list[Tensor]) -> Any:
    """Count with `PeakMemory`, read from its file: in the peer's environment there is no Dovetail."""
    path = Path(__file__).parents[1] / "src/dovetail/training/peak_memory.py"
    spec = importlib.util.spec_from_file_location("peak_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PeakMemory(tensors)


def measure(side: str, python: str, method: str, folder: str, arguments: argparse.Namespace, memory: bool) -> dict:
    names = ("samples", "tokens", "hidden", "intermediate", "vocabulary", "layers", "dtype", "peer_batch")
    command = [python, __file__, "--work", side, "--methods", method, "--folder", folder, *["--memory"] * memory]
    command += [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}, {method}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(method: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    sides = {"ours": sys.executable} | ({"theirs": arguments.peer} if arguments.peer else {})
    row: dict[str, Any] = {"method": method, "dtype": arguments.dtype}
    rounds = [
        {side: measure(side, python, method, folder, arguments, memory=False) for side, python in sides.items()}
        for _ in range(arguments.rounds)
    ]
    for side, python in sides.items():
        row[f"{side}_seconds"] = statistics.median(found[side]["seconds"] for found in rounds)
        row[f"{side}_error"] = rounds[0][side]["error"]
        memory = measure(side, python, method, folder, arguments, memory=True)
        row[f"{side}_memory_blocks"], row["kept_blocks"] = memory["memory_blocks"], memory["kept_blocks"]
    if arguments.peer:
        row["ratio"] = row["theirs_seconds"] / row["ours_seconds"]
    return row


def show(row: dict[str, Any]) -> None:
    print(f"{row['method']} ({row['dtype']})")
    for side in ("ours", "theirs"):
        if f"{side}_seconds" in row:
            print(
                f"    {side:7s} {row[f'{side}_seconds']:7.2f} s   error {row[f'{side}_error']:.5f}"
                f"   memory beyond the model {row[f'{side}_memory_blocks']:.2f} blocks"
            )
    if "ratio" in row:
        print(
            f"    theirs / ours {row['ratio']:.2f}, aim {AIM_TIME}: {'met' if row['ratio'] >= AIM_TIME else 'MISSED'}"
        )
    beyond = row["ours_memory_blocks"] - row["kept_blocks"]
    print(
        f"    activations kept between blocks {row['kept_blocks']:.2f} blocks; the rest of ours {beyond:.2f}, "
        f"aim {AIM_MEMORY}: {'met' if beyond <= AIM_MEMORY else 'MISSED'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="an interpreter that has llm-compressor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(CHAINS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    for name, value in (("samples", 32), ("tokens", 256), ("peer-batch", 1), ("layers", 8), ("hidden", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=32000)
    for name in ("--work", "--folder"):  # for the processes that this one starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), arguments)
        for method in arguments.methods.split(","):
            row = compare(method, folder, arguments)
            print(json.dumps(row), flush=True) if arguments.json else show(row)


if __name__ == "__main__":
    main()
