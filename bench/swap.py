"""Experts on their way into a live model, beside the adapters that they were made of (ComPEFT, Table 5).

The adapter is LoRA of rank 64 on all linear layers of Llama-7B, 160 M parameters in bfloat16: 320 MB as peft saves it.
Values are i.i.d. normal, the hardest to compress; the expert keeps 5 %. The live model is a stock peft model, with real
adapters over base weights that do not exist (device meta). One thread; medians of interleaved rounds.

download  from a server in another process that gives 100 Mbit/s: of the original, to a file; of the expert, through a
          `Store`: index, file, SHA-256, all blocks checked. Wall time
cold      from a file that is not in the page cache to the live parameters. The original: safetensors' `load_file` and
          `copy_` to each; or peft's own way, `load_peft_weights` and `set_peft_model_state_dict`. The expert: a new
          `Store`, and `activate`, which checks each block as it decodes. Wall time, waiting for the disk
warm      the same with files in the page cache, where `load_file` maps pages and copies nothing. Processor time
held      from what a process keeps in memory: `copy_` of 320 MB, and `activate` of 7 MB. Processor time
many      200 experts of 2 M parameters in a folder, a budget for 50 of them, requests by Zipf's law

Of `warm` and `held` there is no aim: zeroing the parameters alone takes half as long as copying them from memory, so
that on a CPU nothing that fills 160 M values is three times faster than a copy.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import fmean, median

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dovetail import experts
from dovetail.experts.live.activate import activate
from dovetail.experts.live.placement import slots
from timing import Row, medians, show

RATE = 100e6 / 8  # bytes a second
HIDDEN, FEEDFORWARD = 4096, 11008
LAYERS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (FEEDFORWARD, HIDDEN),
    "mlp.up_proj": (FEEDFORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEEDFORWARD),
}


def adapter(blocks: int, rank: int, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA adapter of so many blocks of Llama-7B, as peft names it."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for block in range(blocks):
        for layer, (out, inside) in LAYERS.items():
            for part, shape in (("A", (rank, inside)), ("B", (out, rank))):
                name = f"base_model.model.model.layers.{block}.{layer}.lora_{part}.weight"
                found[name] = (torch.randn(shape, generator=generator) / 100).bfloat16()
    return found


def live_model(blocks: int, rank: int) -> PeftModel:
    """A stock peft model whose adapter has those tensors, zero."""
    config = LlamaConfig(num_hidden_layers=blocks, hidden_size=HIDDEN, intermediate_size=FEEDFORWARD)
    wanted = LoraConfig(r=rank, target_modules=[name.rpartition(".")[2] for name in LAYERS])
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config).bfloat16(), wanted, autocast_adapter_dtype=False)
    for name, parameter in list(model.named_parameters()):
        if ".lora_" in name:
            path, _, last = name.rpartition(".")
            model.get_submodule(path).register_parameter(last, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
    assert isinstance(model, PeftModel)
    return model


class Slow(SimpleHTTPRequestHandler):
    """Files of a folder, all downloads together at RATE: a bucket of tokens."""

    lock, ready = threading.Lock(), 0.0

    def copyfile(self, source, outputfile) -> None:
        while chunk := source.read(1 << 16):
            with Slow.lock:
                Slow.ready = max(Slow.ready, time.monotonic()) + len(chunk) / RATE
                pause = Slow.ready - time.monotonic()
            time.sleep(max(0.0, pause))
            outputfile.write(chunk)

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(folder: str, said: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=folder))
    said.send(server.server_address[1])
    server.serve_forever()


def forget(path: Path) -> None:
    """Takes a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wall(functions: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object]) -> dict[str, float]:
    """Median milliseconds of each function, by the clock on the wall, over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in functions if number % 2 == 0 else reversed(list(functions)):
            before()
            start = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(values) for name, values in times.items()}


def one(folder: Path, blocks: int, rounds: int, downloads: int) -> list[Row]:
    original, place = folder / "adapter_model.safetensors", folder / "experts"
    place.mkdir()
    values = adapter(blocks, 64)
    save_file(values, original)
    path = experts.compress(values, 0.05).save(place / "expert.dvt")
    experts.Store.write_index(place)
    model, rows, held = live_model(blocks, 64), [], experts.load(path)
    live = slots(model, held.shapes)
    print(f"{sum(t.numel() for t in values.values()) / 1e6:.1f} M parameters: {original.stat().st_size / 1e6:.1f} MB, "
          f"as an expert {path.stat().st_size / 1e6:.2f} MB", flush=True)  # fmt: skip

    def copy_held() -> None:
        for name, tensor in live.items():
            tensor.data.copy_(values[name])

    def load_original() -> None:
        loaded = load_file(original)
        for name, tensor in live.items():
            tensor.data.copy_(loaded[name])

    def load_with_peft() -> None:
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))

    def load_expert() -> None:
        with experts.Store(place, 1 << 30) as store:
            store.activate(model, "expert")

    if downloads:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        server = context.Process(target=serve, args=(str(folder), there), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{here.recv()}"

        def download_original() -> None:
            with urllib.request.urlopen(f"{url}/{original.name}") as response, open(folder / "got", "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)

        def download_expert() -> None:
            with experts.Store(f"{url}/experts", 1 << 30) as store:
                store.get("expert")

        times = wall({"peer": download_original, "ours": download_expert}, downloads, lambda: None)
        rows.append(Row("download, 100 Mbit/s", times["ours"], times["peer"], 1 / 15))
        server.terminate()
        server.join()
        (folder / "got").unlink()
    load_expert()  # compiles
    loading = {"peer": load_original, "peft": load_with_peft, "ours": load_expert}
    times = wall(loading, rounds, lambda: (forget(original), forget(path)))
    rows.append(Row("cold: file to live / safetensors", times["ours"], times["peer"], 1 / 3))
    rows.append(Row("cold: file to live / peft", times["ours"], times["peft"], 1 / 3))
    times = medians(
        loading
        | {
            "held": copy_held,
            "read": lambda: experts.load(path),
            "activate": lambda: activate(model, held, verified=True),
            "check": lambda: experts.verify(held),
            "zero": lambda: [tensor.data.zero_() for tensor in live.values()],
        },
        rounds,
        warmup=1,
    )
    rows.append(Row("warm: file to live / safetensors", times["ours"], times["peer"]))
    rows.append(Row("warm: file to live / peft", times["ours"], times["peft"]))
    rows.append(Row("held: memory to live / copy", times["activate"], times["held"]))
    rows += [Row(f"  {name} / copy", times[name], times["held"]) for name in ("read", "check", "zero")]
    return rows


def many(folder: Path, count: int, requests: int) -> None:
    """Prints what a store of many experts does under requests that are Zipf's."""
    place = folder / "many"
    place.mkdir()
    values = adapter(1, 26)
    for number in range(count):
        experts.compress(adapter(1, 26, number), 0.05).save(place / f"{number:03d}.dvt")
    model, random = live_model(1, 26), Random(0)
    names = random.choices([f"{n:03d}" for n in range(count)], [1 / (1 + n) for n in range(count)], k=requests)
    most = max(path.stat().st_size for path in place.iterdir())
    size, fit = sum(t.nbytes for t in values.values()), count // 4
    with experts.Store(place, fit * most) as store:
        times: dict[bool, list[float]] = {True: [], False: []}
        for name in names:
            hits, start = store.stats().hits, time.process_time()
            store.activate(model, name)
            times[store.stats().hits > hits].append(time.process_time() - start)
        stats = store.stats()
    repeats = fmean(one == two for one, two in pairwise(names))
    print(
        f"\n{count} experts of {size / 1e6:.1f} MB as bfloat16, a budget for {fit}, {requests} requests by Zipf's law"
    )
    print(
        f"hit rate {stats.hit_rate:.3f}; with {max(1, int(fit * most / size))} original in as many bytes {repeats:.3f}"
    )
    mean, held, read = (1e3 * fmean(each) for each in (times[True] + times[False], times[True], times[False]))
    print(f"mean swap {mean:.2f} ms of processor time: {held:.2f} where it is held, {read:.2f} where it is read")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32, help="of Llama-7B's 32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--downloads", type=int, default=3, help="rounds of downloads; 0 for none")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="dovetail-swap-") as folder:
        rows = one(Path(folder), arguments.blocks, arguments.rounds, arguments.downloads)
        show("experts / originals", rows, arguments.json)
        many(Path(folder), 200, 2000)


if __name__ == "__main__":
    main()
