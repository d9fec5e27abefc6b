"""Quantized Hugging Face folders as bases: the same bytes back, the owner's values, and changed files are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import dovetail
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.export import export
from dovetail.checkpoint.exportable import FORMATS
from dovetail.checkpoint.formats.contract import WEIGHTS
from dovetail.checkpoint.load import load
from dovetail.errors import DovetailError, LoadError
from exported import available
from families import batch, logits, make, move
from small_models import make_tokenizer

torch.set_num_threads(1)
CHAIN = "keep >> lora(r=4) >> regrid"
FOLDERS = [
    ("compressed-tensors", "int(bits=4, group=32, symmetric=true)", "float16"),
    ("compressed-tensors", "int(bits=8, group=0, symmetric=signed, scale_bits=7)", "bfloat16"),
    ("compressed-tensors", "int(bits=4, group=32)", "float32"),
    ("compressed-tensors", "fp8", "bfloat16"),
    ("compressed-tensors", 'fp8(scale="tensor")', "float32"),
    ("bitsandbytes", "nf4", "float32"),
    ("bitsandbytes", "nf4(double=true)", "bfloat16"),
    ("bitsandbytes", "fp4", "float32"),
    ("gptq", "int(bits=4, group=32, symmetric=signed)", "float16"),
    ("gptq", "int(bits=3, group=32)", "float16"),
    ("gptq_v2", "int(bits=2, group=0)", "bfloat16"),
    ("awq", "int(bits=4, group=64)", "float16"),
    ("mlx", "int(bits=4, group=32, scale_bits=7)", "float16"),
    ("mlx", "int(bits=8, group=64)", "float32"),
    ("mlx", "mxfp4", "float16"),
]


def written(to: str, text: str, dtype: str, folder: Path) -> Path:
    """A folder in a format, of a tiny Llama."""
    available(to)
    model = make("llama")
    dovetail.apply(model, text, calibration=[batch(model, seed=4)])
    dovetail.merge(model, packed=True)
    export(model, to, folder, dtype=dtype, tokenizer=make_tokenizer())
    return folder


def kept(folder: Path, **given: Any) -> PreTrainedModel:
    return load(folder, grid="keep", **given)[0]


@pytest.mark.parametrize(("to", "text", "dtype"), FOLDERS)
def test_a_folder_comes_back_byte_for_byte_and_a_tuned_one_differs_in_codes(
    to: str, text: str, dtype: str, tmp_path: Path
) -> None:
    folder = written(to, text, dtype, tmp_path / "one")
    model = kept(folder)
    assert all(layer.base.quantized is not None for layer in chain_layers(model).values())
    export(model, to, tmp_path / "two", dtype=dtype)
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "two"))
    assert before["quantization_config"] == after["quantization_config"]
    dovetail.apply(model, CHAIN)
    move(model)
    inputs = batch(model)
    with torch.no_grad():
        expected = logits(model, inputs)
    assert dovetail.merge(model, packed=True).exact
    with torch.no_grad():
        assert torch.equal(logits(model, inputs), expected)
    export(model, to, tmp_path / "three", dtype=dtype)
    old, new = (load_file(path / WEIGHTS) for path in (folder, tmp_path / "three"))
    changed = {name.rpartition(".")[2] for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    codes = {"compressed-tensors": "weight_packed", "gptq": "qweight", "gptq_v2": "qweight", "awq": "qweight"}.get(
        to, "weight"
    )
    assert changed == {"weight" if "fp8" in text else codes}


def test_what_bitsandbytes_and_transformers_wrote_is_read_with_their_values(tmp_path: Path) -> None:
    available("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    make("llama").save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)
    stock.save_pretrained(tmp_path / "out")
    make_tokenizer().save_pretrained(tmp_path / "out")
    layers = chain_layers(kept(tmp_path / "out"))
    assert len(layers) == 14
    for name, layer in layers.items():
        weight: Any = stock.get_submodule(name).get_parameter("weight")
        assert layer.base.identity == "nf4(block=64, double=True)"
        expected = dequantize_4bit(weight.data, weight.quant_state).float()
        assert torch.equal(layer.base.matrix().to(weight.quant_state.dtype).float(), expected)


def test_what_compressed_tensors_wrote_is_read_with_its_values(tmp_path: Path) -> None:
    available("compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    folder = written("compressed-tensors", "int(bits=4, group=32, symmetric=true)", "bfloat16", tmp_path / "out")
    scheme = QuantizationScheme.model_validate(
        json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    )
    tensors, model = load_file(folder / WEIGHTS), make("llama")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            scale = (module.weight.detach().view(len(module.weight), -1, 32).abs().amax(dim=2) / 7.5).bfloat16()
            weight = module.weight.detach().bfloat16()
            packed = BaseCompressor.get_value_from_registry("pack-quantized").compress(
                {"weight": weight, "weight_scale": scale}, scheme
            )
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items() if tensor is not None}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model = kept(folder)
    with torch.no_grad():
        inputs = batch(model)
        assert torch.equal(logits(model, inputs), logits(stock, inputs))


def test_what_mlx_quantized_is_read_exactly_or_refused(tmp_path: Path) -> None:
    available("mlx")
    import mlx.core as mx
    import numpy as np

    folder = written("mlx", "int(bits=4, group=64)", "float32", tmp_path / "out")
    tensors = load_file(folder / WEIGHTS)
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    parts = mx.quantize(mx.array(weight.numpy()), group_size=64, bits=4)
    names = ("weight", "scales", "biases")
    made = {
        f"model.layers.0.mlp.up_proj.{name}": torch.from_numpy(np.array(one))
        for name, one in zip(names, parts, strict=True)
    }
    save_file(tensors | made, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(LoadError, match=r"(?s)up_proj.*(exactly|float16 holds|a code)"):
        kept(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "awq, gemv"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"config_groups": {"a": {"input_activations": {"num_bits": 8}}}}, "quantized activations"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}, "transform_config"),
        ({"config_groups": {"FP8_DYNAMIC": ["Linear"]}}, "a preset"),
        ({"config_groups": {"a": {"weights": {"num_bits": 7}}}}, "num_bits 7"),
        ({"quant_method": "gptq", "checkpoint_format": None, "format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "format": "gptq"}, "no layer with a grid"),
    ],
)
def test_other_formats_are_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = written("compressed-tensors", "int(bits=4, group=32, symmetric=true)", "float16", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=f"(?s){said}"):
        kept(folder)


def test_grids_that_are_not_held_are_refused(tmp_path: Path) -> None:
    folder = written("gptq", "int(bits=4, group=32)", "float16", tmp_path / "out")
    tensors, name = load_file(folder / WEIGHTS), "model.layers.0.mlp.up_proj"
    changes: dict[str, tuple[Tensor, str]] = {
        "g_idx": (tensors[f"{name}.g_idx"].flip(0), "order of activations"),
        "qzeros": (torch.full_like(tensors[f"{name}.qzeros"], -1), "a zero point of 16"),
        "scales": (tensors[f"{name}.scales"].float() * 1.0001, "float16 holds"),
        "qweight": (tensors[f"{name}.qweight"][:-3], "bits"),
    }
    for part, (tensor, said) in changes.items():
        save_file(tensors | {f"{name}.{part}": tensor.contiguous()}, folder / WEIGHTS, {"format": "pt"})
        with pytest.raises(LoadError, match=rf"(?s)up_proj.*{said}"):
            kept(folder)
    save_file({key: t for key, t in tensors.items() if not key.startswith(name)}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(LoadError, match="1 weights of LlamaForCausalLM not stored"):
        kept(folder)


def test_tensors_that_the_model_would_ignore_are_refused(tmp_path: Path) -> None:
    folder = written("awq", "int(bits=4, group=32)", "float16", tmp_path / "out")
    tensors, ones = load_file(folder / WEIGHTS), torch.ones(64, dtype=torch.float16)
    for name in ("mlp.up_proj.bias", "mlp.act_fn.scales", "mlp.up_proj.lora_A"):
        save_file(tensors | {f"model.layers.0.{name}": ones}, folder / WEIGHTS, {"format": "pt"})
        with pytest.raises(LoadError, match=name.rpartition(".")[2]):
            kept(folder)
    save_file(tensors | {"model.layers.0.mlp.up_proj.bias": ones * 0}, folder / WEIGHTS, {"format": "pt"})
    assert kept(folder).config.dovetail["layers"]


def test_an_fp8_code_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = written("compressed-tensors", "fp8", "bfloat16", tmp_path / "out")
    tensors, name = load_file(folder / WEIGHTS), "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[0, 0] = 0xFF
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(LoadError, match="NaN or infinity"):
        kept(folder)


def mutate(path: Path, content: bytes, rng: random.Random) -> None:
    """Write the file with one to three bytes changed, cut short, or with bytes put in."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        in_header = rng.random() < 0.5
        at = rng.randrange(int.from_bytes(content[:8], "little") + 8 if in_header else len(content))
        changed[at] = rng.randrange(256)
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    path.write_bytes(changed)


def check_mutated(to: str, folder: Path, count: int) -> int:
    """Load changed files: each is refused, or gives the values that the owner decodes; return how many were loaded."""
    content, rng, loaded = (folder / WEIGHTS).read_bytes(), random.Random(to), 0
    for _ in range(count):
        mutate(folder / WEIGHTS, content, rng)
        try:
            model = kept(folder, dtype="float32")
        except DovetailError:
            continue
        loaded += 1
        with safe_open(folder / WEIGHTS, "pt") as file:
            keys = set(file.keys())
        for name, layer in chain_layers(model).items():
            quantized = layer.base.quantized
            if quantized is not None and any(key.startswith(f"{name}.") for key in keys):
                values = FORMATS[to].decode(FORMATS[to].written(folder, name), quantized, torch.float32)
                assert torch.equal(values, quantized.dequantize(torch.empty_like(values)))
    return loaded


@pytest.mark.parametrize(
    ("to", "text", "dtype"), [FOLDERS[2], FOLDERS[3], FOLDERS[6], FOLDERS[9], FOLDERS[11], FOLDERS[12]]
)
def test_changed_files_are_refused_or_read_as_their_owner_reads_them(
    to: str, text: str, dtype: str, tmp_path: Path
) -> None:
    assert check_mutated(to, written(to, text, dtype, tmp_path / "out"), 12) > 0


def test_a_run_continues_on_the_grid_of_a_folder(tmp_path: Path) -> None:
    folder = written("gptq", "int(bits=4, group=32, symmetric=signed)", "float16", tmp_path / "out")
    found = dovetail.plan(CHAIN, str(folder), memory=False, to="gptq")
    assert found.legal
    assert found.export_kinds == {"int4, symmetric, groups of 32": 14}
    with pytest.raises(LoadError, match="grid=keep"):
        load("playground", grid="keep")
