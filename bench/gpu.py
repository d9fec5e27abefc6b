"""Steps, memory, apply, merge and decode of an 8 B Llama's blocks on a GPU, against peft and bitsandbytes.

    python bench/gpu.py [--tiny] [--blocks 4] [--rounds 7] [--minutes 8] [--only kernels,step,...] [--output gpu.json]

Random weights at the shapes of Llama 3 8 B, in bfloat16 (float32 on a CPU); 4 blocks with a vocabulary of 512, so that
the blocks decide, and the whole model where 24 GB are free. LoRA of rank 16 on all linear layers, 512 tokens.

    kernels  reading a weight's codes, rounding to its grid, and a product of one vector, against the definition
    step     forward, backward and an AdamW step, and the peak of allocated memory
    apply    quantizing the blocks
    merge    merging the trained adapters
    decode   one token of a packed model, with a cache
    whole    a step and a token of the whole model of 8 B

Peers are peft's LoRA on the dense model and, where bitsandbytes is installed on a GPU, on its NF4 layers. Rounds are
interleaved and values are medians: of wall time on a GPU, after waiting for it, and of processor time on a CPU. Nothing
starts after --minutes; what did not run says "not measured". With --tiny, on any device, everything runs at sizes that
say nothing. Results are printed as a table and written as JSON with --output.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")

import peft
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import dovetail
from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.keeping import keeping
from dovetail.links.quantize import accelerate
from dovetail.training.peak_memory import PeakMemory
from timing import medians

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUANTIZERS = ("int(bits=4, group=64)", "nf4")
WHOLE_NBYTES = 24e9
"""Free memory from which the whole model is measured: its 16 GB in bfloat16, and what a step needs beside it."""
FORMATS = (*QUANTIZERS, "int(bits=2, group=64)", "int(bits=3, group=64)", "int(bits=8, group=64)")


@dataclass(frozen=True)
class Result:
    """One line of a table: our median and a peer's, in a unit; None for what was not measured."""

    table: str
    name: str
    peer_name: str
    ours: float | None
    peer: float | None
    unit: str = "ms"

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.ours is not None and self.peer else None


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured."""

    device: torch.device
    dtype: torch.dtype
    config: LlamaConfig
    whole: LlamaConfig
    tokens: int
    rounds: int
    decoded: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def bitsandbytes(self) -> bool:
        """Whether its layers are a peer here: they need a GPU."""
        return self.on_gpu and importlib.util.find_spec("bitsandbytes") is not None

    def now(self) -> float:
        """Return seconds: of wall time, once the GPU has finished; of processor time without a GPU."""
        if not self.on_gpu:
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def medians(self, functions: dict[str, Callable[[], object]], warmup: int = 2) -> dict[str, float]:
        return medians(functions, self.rounds, warmup, self.now)

    def once(self, work: Callable[[], object]) -> float:
        """Return milliseconds of work that cannot be repeated."""
        start = self.now()
        work()
        return 1e3 * (self.now() - start)

    def peak_nbytes(self, model: nn.Module, work: Callable[[], object]) -> float:
        """Return the peak of memory of the model and its first step: other models that are alive do not count."""
        held = {each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            work()
            return sum(held.values()) + torch.cuda.max_memory_allocated(self.device) - before
        with PeakMemory([*model.parameters(), *model.buffers()]) as peak:
            work()
        return peak.peak_nbytes


def config(tiny: bool, blocks: int, vocabulary: int) -> LlamaConfig:
    """Return that of Llama 3 8 B with fewer blocks and tokens, or a tiny one."""
    wide = (128, 256, 4, 2) if tiny else (4096, 14336, 32, 8)
    return LlamaConfig(
        hidden_size=wide[0], intermediate_size=wide[1], num_attention_heads=wide[2], num_key_value_heads=wide[3],
        num_hidden_layers=blocks, vocab_size=vocabulary, rope_theta=500000.0,
    )  # fmt: skip


def dense(at: Setting, of: LlamaConfig | None = None) -> PreTrainedModel:
    """Return the model with random weights, drawn on the device; the same ones each time."""
    torch.manual_seed(0)
    with torch.device(at.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(at.dtype)
        try:
            model = LlamaForCausalLM(copy.deepcopy(of or at.config))
        finally:
            torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def under_peft(at: Setting, *, nf4: bool) -> nn.Module:
    """Return peft's LoRA on the dense model, or on bitsandbytes' NF4 layers."""
    model = dense(at)
    if nf4:
        replace_by_bitsandbytes(model, at)
    asked = peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR)
    return peft.get_peft_model(model, asked, autocast_adapter_dtype=False).train()


def replace_by_bitsandbytes(model: nn.Module, at: Setting) -> None:
    """Replace the linear layers of the blocks by NF4 layers, which quantize when they come to the GPU."""
    import bitsandbytes

    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in LINEAR:
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=at.dtype,
                compress_statistics=False,
            )  # fmt: skip
            weight = module.weight.data.cpu()
            layer.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            setattr(model.get_submodule(parent), name, layer.to(at.device))


@contextmanager
def freed() -> Iterator[None]:
    """Give the memory of a table back."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def step_of(model: nn.Module, at: Setting, tokens: int | None = None) -> Callable[[], None]:
    ids = torch.randint(at.config.vocab_size, (1, tokens or at.tokens), device=at.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def by_definition() -> Iterator[None]:
    """Let no kernel work."""
    asked, accelerate.DEVICES = accelerate.DEVICES, ()
    try:
        yield
    finally:
        accelerate.DEVICES = asked


# -------------------------------------------------------------------------------------------------------------- tables


def kernels(at: Setting) -> list[Result]:
    """One weight of the feed-forward layer; the kernels are Triton's where they work, else there is nothing to say."""
    results = []
    working = at.on_gpu and accelerate.kernels_work(at.device)
    shape = (at.config.intermediate_size, at.config.hidden_size)
    weight = torch.randn(shape, device=at.device)
    for text in FORMATS:
        grid = dovetail.chain(text).links[0].quantize(weight)
        out, rows = torch.empty(shape, dtype=at.dtype, device=at.device), torch.empty_like(weight)
        x = torch.randn(1, shape[1], device=at.device).to(at.dtype)

        def read(grid: QuantizedWeight = grid, out: Tensor = out) -> Tensor:
            return grid.dequantize(out)

        def snap(grid: QuantizedWeight = grid, rows: Tensor = rows) -> Tensor:
            return grid.snap_(rows.copy_(weight), 0)

        def from_codes(grid: QuantizedWeight = grid, x: Tensor = x) -> Tensor | None:
            return grid.product(x)

        def product(out: Tensor = out, x: Tensor = x) -> Tensor:
            return x @ out.t()

        def defined(work: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                with by_definition():
                    work()

            return run

        functions = {
            "read": read, "read by definition": defined(read), "snap": snap, "snap by definition": defined(snap),
            "copy": lambda out=out: out.clone(), "dense": product,
        }  # fmt: skip
        if multiplies := from_codes() is not None:
            functions["codes"] = from_codes
        found = at.medians(functions)
        ours = found if working else {}
        results += [
            Result("kernels", f"read {text}", "definition", ours.get("read"), found["read by definition"]),
            Result("kernels", f"read {text}", "copying the dense weight", ours.get("read"), found["copy"]),
            Result("kernels", f"round to {text}", "definition", ours.get("snap"), found["snap by definition"]),
            Result(
                "kernels",
                f"one vector, {text}",
                "dense",
                found["codes"] if multiplies and working else None,
                found["dense"],
            ),
        ]
    return results


def step(at: Setting) -> list[Result]:
    """Steps of all models, which are alive at once, and the peak memory of one step of each."""
    chains = [*(f"{q} >> lora(r=16)" for q in QUANTIZERS), *(f"{q} >> lora(r=16) >> regrid" for q in QUANTIZERS)]
    chains.append(f"magnitude(0.5) >> {QUANTIZERS[0]} >> lora(r=16) >> remask >> regrid")
    made: dict[str, Callable[[], nn.Module]] = {
        text: lambda t=text: dovetail.apply(dense(at), t).train() for text in chains
    }
    made["peft LoRA"] = lambda: under_peft(at, nf4=False)
    if at.bitsandbytes:
        made["bitsandbytes and peft LoRA"] = lambda: under_peft(at, nf4=True)
    models, steps, peaks = {}, {}, {}
    for name, make in made.items():
        models[name] = make()
        steps[name] = step_of(models[name], at)
        with freed():  # the first step: buffers that stay are made in it
            peaks[name] = at.peak_nbytes(models[name], steps[name]) / 1e6
    found = at.medians(steps)
    closed = [text for text in chains if text.endswith("regrid")]
    kept = {}
    for text in closed:
        with keeping(models[text]):
            kept |= at.medians({text: steps[text]})
    results = []
    for peer in ("peft LoRA", "bitsandbytes and peft LoRA"):
        results += [Result("step", text, peer, found[text], found.get(peer)) for text in chains]
        results += [Result("step", f"{text}, kept", peer, kept[text], found.get(peer)) for text in closed]
        results += [Result("peak memory", text, peer, peaks[text], peaks.get(peer), "MB") for text in chains]
    return results


def apply(at: Setting) -> list[Result]:
    """Quantizing; the peer's layers quantize what comes from the CPU, so the copy to the GPU is in its time alone."""
    results = []
    source = dense(at)
    copying = at.once(lambda: copy.deepcopy(source))
    peer = None
    if at.bitsandbytes:
        other = copy.deepcopy(source)
        peer = at.once(lambda: replace_by_bitsandbytes(other, at))
        del other
    calibration = [
        {"input_ids": torch.randint(at.config.vocab_size, (1, at.tokens), device=at.device)} for _ in range(8)
    ]
    for text in (*QUANTIZERS, "gptq(bits=4, group=64)", "wanda(0.5)"):
        times = []
        for _ in range(1 if text.startswith("gptq") else 3):
            model = copy.deepcopy(source)
            times.append(at.once(lambda m=model, t=text: dovetail.apply(m, t, calibration=calibration)))
        ours = statistics.median(times)
        results.append(Result("apply", text, "copying the dense model", ours, copying))
        if text == "nf4":
            results.append(Result("apply", text, "bitsandbytes, from the CPU", ours, peer))
    return results


def merge(at: Setting) -> list[Result]:
    """Merging with its verdict; peft's merge of a dense model has none."""
    model = under_peft(at, nf4=False)
    theirs = at.once(lambda: model.merge_and_unload())
    results = []
    for text in (*(f"{q} >> lora(r=16) >> regrid" for q in QUANTIZERS), "lora(r=16)"):
        times = []
        for _ in range(3):
            mine = dovetail.apply(dense(at), text)
            times.append(at.once(lambda m=mine, t=text: dovetail.merge(m, lossy=not t.endswith("regrid"))))
        results.append(Result("merge", text, "peft LoRA, dense", statistics.median(times), theirs))
    return results


def decode_of(model: Any, at: Setting) -> Callable[[], None]:
    """Return a function that writes a few tokens after a prompt of 8, which is read before."""
    first = torch.arange(8, device=at.device)[None]
    with torch.inference_mode():
        filled = DynamicCache(config=model.config)
        model(first, past_key_values=filled, use_cache=True)

    @torch.inference_mode()
    def decode() -> None:
        cache = copy.deepcopy(filled)
        token = first[:, :1]
        for _ in range(at.decoded):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return decode


def packed(at: Setting, text: str, of: LlamaConfig | None = None) -> PreTrainedModel:
    model = dovetail.apply(dense(at, of), text)
    dovetail.merge(model, packed=True)
    return model


def decode(at: Setting) -> list[Result]:
    models: dict[str, Any] = {text: packed(at, text) for text in FORMATS}
    models["dense"] = dense(at)
    if at.bitsandbytes:
        models["bitsandbytes"] = dense(at)
        replace_by_bitsandbytes(models["bitsandbytes"], at)
    found = at.medians({name: decode_of(model, at) for name, model in models.items()})
    each = {name: value / at.decoded for name, value in found.items()}
    return [
        *(Result("decode", text, f"dense, {at.dtype}", each[text], each["dense"]) for text in FORMATS),
        *(Result("decode", text, "bitsandbytes NF4", each[text], each.get("bitsandbytes")) for text in FORMATS),
    ]


def whole(at: Setting) -> list[Result]:
    """The model with all blocks and tokens, one after the other; None where memory is short."""
    names = ("step of nf4 >> lora(r=16)", "peak of that step", "token of nf4, packed", "token, dense")
    free = torch.cuda.mem_get_info(at.device)[0] if at.on_gpu else 0
    if at.config.hidden_size > 128 and free < WHOLE_NBYTES:
        return [Result("whole", name, "", None, None, "MB" if "peak" in name else "ms") for name in names]
    with freed():
        model = dense(at, at.whole)
        token = at.medians({"dense": decode_of(model, at)})["dense"] / at.decoded
        dovetail.apply(model, "nf4 >> lora(r=16)")
        work = step_of(model.train(), at)
        peak = at.peak_nbytes(model, work) / 1e6
        ms = at.medians({"step": work})["step"]
        del model, work
    with freed():
        small = at.medians({"packed": decode_of(packed(at, "nf4", at.whole), at)})["packed"] / at.decoded
    return [
        Result("whole", names[0], "", ms, None),
        Result("whole", names[1], "", peak, None, "MB"),
        Result("whole", names[2], names[3], small, token),
    ]


TABLES = {"kernels": kernels, "step": step, "decode": decode, "apply": apply, "merge": merge, "whole": whole}


def shown(value: float | None, digits: int = 2) -> str:
    return "not measured" if value is None else f"{value:,.{digits}f}"


def environment(at: Setting) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "triton", "bitsandbytes")
    return {
        "device": torch.cuda.get_device_name(at.device) if at.on_gpu else "a CPU",
        "dtype": str(at.dtype),
        "triton_kernels": at.on_gpu and accelerate.kernels_work(at.device),
        "blocks": at.config.num_hidden_layers, "width": at.config.hidden_size, "tokens": at.tokens,
        "versions": {name: version(name) for name in packages if importlib.util.find_spec(name) is not None},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not asked.tiny:
        print("no CUDA device: not measured (--tiny runs everything at a size that says nothing)")
        return
    at = Setting(
        device=torch.device("cuda" if on_gpu else "cpu"), dtype=torch.bfloat16 if on_gpu else torch.float32,
        config=config(asked.tiny, 1 if asked.tiny else asked.blocks, 512),
        whole=config(asked.tiny, 2 if asked.tiny else 32, 512 if asked.tiny else 128256),
        tokens=16 if asked.tiny else 512, rounds=1 if asked.tiny else asked.rounds, decoded=2 if asked.tiny else 16,
    )  # fmt: skip
    started, results, late = time.monotonic(), [], []
    for name in asked.only.split(","):
        if time.monotonic() - started > 60 * asked.minutes:
            late.append(name)
            continue
        with freed():
            results += TABLES[name](at)
    facts = environment(at) | {"seconds": time.monotonic() - started, "not_measured": late}
    print(f"{facts['device']}, {facts['dtype']}, Triton's kernels: {facts['triton_kernels']}")
    names = [f"{each.table}: {each.name}" + (f" / {each.peer_name}" if each.peer_name else "") for each in results]
    wide = max(map(len, names), default=0)
    print(f"{'':{wide}s} {'ours':>13s} {'peer':>13s} {'ratio':>13s}")
    for name, each in zip(names, results, strict=True):
        peer = f"{shown(each.peer):>13s} {shown(each.ratio, 3):>13s}" if each.peer_name else " " * 27
        print(f"{name:{wide}s} {shown(each.ours):>13s} {peer} {each.unit}")
    for name in late:
        print(f"{name}: not measured, {asked.minutes:g} minutes were over")
    if asked.output is not None:
        rows = [asdict(each) | {"ratio": each.ratio} for each in results]
        asked.output.write_text(json.dumps({**facts, "results": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
