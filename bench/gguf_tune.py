"""A Q4_K_M file tuned in its own grid: what merging costs, and whether llama.cpp scores what Dovetail scores.

    python bench/gguf_tune.py MODEL.gguf DATA OUTPUT [--steps 100] [--questions 100]

DATA is a folder with mawps/train.jsonl and mawps/test.jsonl. `keep >> lora(r=16) >> regrid` and, as peers do, an open
`keep >> lora(r=16)` are trained on MAWPS over the grid of the file. Merged models are written as GGUF files of the same
formats:

    merged           with regrid: only codes differ from the file
    quantized anew   a LoRA added to the dequantized weights, which are quantized anew by ggml's own rule
    rounded          the open LoRA added, and rounded to the nearest codes of the file's grid

Each is scored on the first token of the answers, in Dovetail (dequantized weights, float32) and in llama.cpp (package
xllamacpp): how often it is the likeliest, and its mean loss. Training and every score are kept in OUTPUT, so the script
can be killed and started again; it writes OUTPUT/table.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

import dovetail
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.chains.link import Adapter
from dovetail.checkpoint.config import empty_model, load_config, load_tokenizer
from dovetail.checkpoint.formats.gguf import checked_header, kept_tensors

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "gemma"))
from prepare import records

CHAINS = {"kept": "keep >> lora(r=16) >> regrid", "open": "keep >> lora(r=16)"}


def tuned(name: str, file: Path, data: Path, output: Path, steps: int) -> Any:
    """Return the model under its chain, trained; training is resumed, and its adapter kept."""
    model, tokenizer = dovetail.load(file, grid="keep")
    adapter, training = output / name / "adapter", output / name / "training"
    if (adapter / "adapter.json").is_file():
        return dovetail.load_adapter(model, adapter), tokenizer
    dovetail.apply(model, CHAINS[name], seed=0)
    began = time.perf_counter()
    report = dovetail.train(
        model, tokenizer, records(data, "mawps", "train"), max_steps=steps, batch_size=4, max_length=96, warmup=0.1,
        seed=0, output_dir=training, resume=training.exists(), checkpoint_every=10,
        on_log=lambda *said, **more: print(said, more, f"{time.perf_counter() - began:.0f} s", flush=True),
    )  # fmt: skip
    dovetail.save_adapter(model, adapter)
    (output / name / "seconds.json").write_text(json.dumps(time.perf_counter() - began))
    print(name, report.stages[-1], flush=True)
    return model, tokenizer


@torch.no_grad()
def folded(layer: ChainLinear) -> torch.Tensor:
    """Return W + B A of a layer, (o, i) float32, without the grid."""
    weight = layer.base.matrix(torch.float32)
    for state in layer.states:
        if isinstance(state.link, Adapter):
            weight, _ = state.link.fold(weight, None, state.values())
    return weight


def quantize_anew(weights: dict[str, torch.Tensor], source: Path, path: Path) -> None:
    """Write a file whose layers are quantized by ggml's own rule, in the formats of the source, without statistics."""
    import xllamacpp

    header = checked_header(source)
    folder = Path(xllamacpp.__file__).parent
    library = ctypes.CDLL(str(next(folder.glob("*.abi3.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    shutil.copyfile(source, path)
    kept = kept_tensors(header, empty_model(load_config(source)))
    with path.open("r+b") as file:
        for layer, weight in weights.items():
            (o, i), (start, nbytes) = weight.shape, header.places[kept[layer].name]
            assert kept[layer].rows is None, "the rows of this family are permuted"
            target = ctypes.create_string_buffer(nbytes)
            values = weight.contiguous().numpy()
            pointer = values.ctypes.data_as(ctypes.c_void_p)
            kind = ctypes.c_int(header.types[kept[layer].name])
            rows = (ctypes.c_int64(0), ctypes.c_int64(o), ctypes.c_int64(i))
            written = library.ggml_quantize_chunk(kind, pointer, target, *rows, None)
            assert written == nbytes
            file.seek(start)
            file.write(target.raw)


def make_files(given: argparse.Namespace) -> dict[str, Path | None]:
    """Write the merged models that are missing, and return all by name; None for the open LoRA beside its base."""
    files: dict[str, Path | None] = {"as it is": given.file}
    for chain in CHAINS:
        merged, anew = given.output / f"{chain}.gguf", given.output / f"{chain}_anew.gguf"
        if not (given.output / f"{chain}.json").is_file():
            model, _ = tuned(chain, given.file, given.data, given.output, given.steps)
            before = {name: layer.base.quantized for name, layer in chain_layers(model).items()}
            quantize_anew({name: folded(layer) for name, layer in chain_layers(model).items()}, given.file, anew)
            report = dovetail.merge(model, lossy=chain == "open", packed=True)
            moved = sum(
                int((one.codes_of(0, one.shape[0])[0] != two.codes_of(0, two.shape[0])[0]).sum())
                for name, layer in chain_layers(model).items()
                if (one := before[name]) is not None and (two := layer.base.quantized) is not None
            )
            notes = dovetail.export(model, "gguf", merged).notes
            said = {
                "exact": report.exact,
                "moved codes": moved,
                "notes": notes,
                "differing": same_weights(model, merged),
            }
            print(chain, said, flush=True)
            (given.output / f"{chain}.json").write_text(json.dumps(said))
        name = "tuned in the grid, merged" if chain == "kept" else "open LoRA, rounded to the grid"
        other = "the same LoRA, quantized anew" if chain == "kept" else "open LoRA, quantized anew"
        files |= {name: merged, other: anew}
    return files | {"open LoRA, not merged": None}


def same_weights(model: Any, file: Path) -> int:
    """Count the weights of a file, as transformers dequantizes them, that are not the packed model's."""
    dense, _ = dovetail.load(file)
    return sum(
        int((dense.get_submodule(name).get_parameter("weight") != layer.base.matrix()).sum())
        for name, layer in chain_layers(model).items()
    )


@torch.inference_mode()
def ours(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> list[tuple[bool, float]]:
    """Return of each question whether the likeliest next token begins the answer, and the loss of that token."""
    found = []
    for question in questions:
        ids, right = tokens(tokenizer, question)
        logits = model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()
        found.append((int(logits.argmax()) == right, -float(logits.log_softmax(0)[right])))
    return found


def theirs(file: Path, questions: list[dict[str, Any]]) -> list[tuple[bool, float]]:
    """Return the same of llama.cpp, on the same tokens; the loss is at least that of the 1000th token."""
    import xllamacpp

    tokenizer, library = load_tokenizer(file), vars(xllamacpp)
    asked = library["CommonParams"]()
    asked.model.path, asked.n_ctx, asked.warmup = str(file), 512, False
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    server = library["Server"](asked)
    found = []
    for question in questions:
        ids, right = tokens(tokenizer, question)
        said: Any = server.handle_completions(
            {"prompt": ids, "temperature": 0, "top_k": 1, "n_predict": 1, "logprobs": 1000, "n_probs": 1000}
        )
        top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        losses = {each["id"]: -each["logprob"] for each in top}
        found.append((top[0]["id"] == right, losses.get(right, max(losses.values()))))
    return found


def tokens(tokenizer: Any, question: dict[str, Any]) -> tuple[list[int], int]:
    """Return the tokens of a question, and the first one of its answer."""
    ids = tokenizer(question["prompt"])["input_ids"]
    return ids, tokenizer(question["answer"], add_special_tokens=False)["input_ids"][0]


def score(given: argparse.Namespace, files: dict[str, Path | None]) -> None:
    """Score the files that have no score yet, and write the table; None stands for the open LoRA beside its base."""
    questions = records(given.data, "mawps", "test")[: given.questions]
    path = given.output / "scores.json"
    done: dict[str, list[tuple[bool, float]]] = json.loads(path.read_text()) if path.is_file() else {}
    for name, file in files.items():
        for engine in ("Dovetail", "llama.cpp"):
            if f"{name}/{engine}" in done or (file is None and engine != "Dovetail"):
                continue
            if engine == "llama.cpp":
                assert file is not None
                found = theirs(file, questions)
            else:
                under: Any = tuned("open", given.file, given.data, given.output, given.steps) if file is None else None
                model, tokenizer = under or dovetail.load(file or given.file)
                found = ours(model, tokenizer, questions)
            done[f"{name}/{engine}"] = found
            path.write_text(json.dumps(done))
    lines = [
        "| file | right, Dovetail | right, llama.cpp | loss, Dovetail | loss, llama.cpp | the same verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name in files:
        one, two = done[f"{name}/Dovetail"], done.get(f"{name}/llama.cpp")
        cells = [str(sum(right for right, _ in one)), "", f"{sum(loss for _, loss in one) / len(one):.3f}", "", ""]
        if two is not None:
            cells[1] = str(sum(right for right, _ in two))
            cells[3] = f"{sum(loss for _, loss in two) / len(two):.3f}"
            cells[4] = f"{sum(a[0] == b[0] for a, b in zip(one, two, strict=True))} of {len(one)}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (given.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def main() -> None:
    """Train, merge, write and score what is not in OUTPUT yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--train-only", choices=CHAINS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    if given.train_only:
        tuned(given.train_only, given.file, given.data, given.output, given.steps)
        return
    score(given, make_files(given))


if __name__ == "__main__":
    main()
