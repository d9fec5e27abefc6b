"""One training step of a layer and of a model, against peft (and bitsandbytes + peft): ratios of medians.

    python bench/train_step.py [--rounds 30] [--json] [--only layer,model,quantized,closed]

One thread, bfloat16, 2048 x 2048, rank 8, 512 tokens; the peer's adapters in bfloat16 too, its fastest setting;
forward and backward, gradients for the input and the adapters. Rounds are interleaved; times are processor time. Rows
"floor" are the frozen layer alone, forward and the gradient of its input: no method that keeps the base apart can be
faster than that, so where the floor's ratio is above a target, this processor's matrix product decides, not the method.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from timing import Row, medians, show

WIDTH, RANK, TOKENS = 2048, 8, 512
BF16 = torch.bfloat16


class Net(nn.Module):
    """One linear layer under a name that targets can match."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().to(BF16)


def ours(chain: str, model: nn.Module | None = None) -> nn.Module:
    model = model or net()
    batch = {"x": torch.randn(64, WIDTH, dtype=BF16)}
    dovetail.apply(model, chain, targets="*proj*", calibration=[batch])
    with torch.no_grad():
        for layer in chain_layers(model).values():
            for parameter in layer.links.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    return model


def peers(config: peft.PeftConfig, model: nn.Module | None = None, bf16: bool = True) -> nn.Module:
    return peft.get_peft_model(model or net(), config, autocast_adapter_dtype=not bf16)  # type: ignore[arg-type]


def step(model: nn.Module, x: Tensor, grad: Tensor):
    def run() -> None:
        model(x).backward(grad)
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return run


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(TOKENS, WIDTH).to(BF16).requires_grad_(), torch.randn(TOKENS, WIDTH).to(BF16)


PEERS = {
    "lora": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["proj"]),
    "dora": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["proj"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["proj"], feedforward_modules=[]),
    "loha": peft.LoHaConfig(r=RANK, alpha=RANK, target_modules=["proj"]),
    "vera": peft.VeraConfig(r=RANK, target_modules=["proj"]),
}


def layer(rounds: int) -> list[Row]:
    """Each method against peft's layer of the same method; chains against peft's single LoRA."""
    single = [("lora", 0.95), ("vera", 0.85), ("dora", 0.30), ("loha", 0.20), ("ia3", 0.90)]
    rows = []
    x, grad = inputs()
    frozen = net().requires_grad_(False)
    for name, target in single:
        mine = ours(name if name == "ia3" else f"{name}(r={RANK})")
        functions = {
            "ours": step(mine, x, grad),
            "peer": step(peers(PEERS[name]), x, grad),
            "floor": step(frozen, x, grad),
        }
        found = medians(functions, rounds)
        rows.append(Row(f"{name} / peft {name}", found["ours"], found["peer"], target))
        rows.append(Row("    floor", found["floor"], found["peer"]))
    for text in (f"lora(r={RANK}) >> ia3", f"lora(r={RANK}) >> vera(r={RANK}) >> dora(r={RANK}) >> ia3"):
        found = medians({"ours": step(ours(text), x, grad), "peer": step(peers(PEERS["lora"]), x, grad)}, rounds)
        rows.append(Row(f"{text} / peft lora", found["ours"], found["peer"], 1.1))
    return rows


def quantized(rounds: int) -> list[Row]:
    """nf4 >> lora against bitsandbytes' Linear4bit under peft."""
    import bitsandbytes as bnb

    base = net()
    linear = bnb.nn.Linear4bit(
        WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=BF16, compress_statistics=False
    )
    linear.weight = bnb.nn.Params4bit(
        base.proj.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    base.proj = linear.to("cpu")
    peer = peers(PEERS["lora"], base)
    x, grad = inputs()
    functions = {
        "ours": step(ours(f"nf4 >> lora(r={RANK})"), x, grad),
        "peer": step(peer, x, grad),
        "floor": step(net().requires_grad_(False), x, grad),
    }
    found = medians(functions, rounds)
    return [
        Row("nf4 >> lora / bitsandbytes + peft lora", found["ours"], found["peer"], 0.85),
        Row("    floor, without dequantizing", found["floor"], found["peer"]),
    ]


class Naive(nn.Module):
    """The same closed chain in ordinary autograd: the definition, W' made and saved."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layer: ChainLinear = next(iter(chain_layers(model).values()))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.effective_weight()
        return nn.functional.linear(x, weight, bias)


class NaiveMask(nn.Module):
    """SparsePEFT as one would write it in bfloat16: (W + (B A) * M), the mask held as a bfloat16 tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layer = next(iter(chain_layers(model).values()))
        state = layer.states[0]
        self.a, self.b = copy.deepcopy(state.get_parameter("A")), copy.deepcopy(state.get_parameter("B"))
        self.weight = layer.base.matrix()
        self.mask = layer.base.mask_rows(slice(None)).to(BF16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + (self.b.to(BF16) @ self.a.to(BF16)) * self.mask)


def saved_nbytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, frozen parameters and the input apart."""
    frozen = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    total: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in frozen:
            total[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(total.values())


def closed(rounds: int) -> list[Row]:
    """remask and regrid against naive autograd; and the bytes that they save against plain LoRA's."""
    x, grad = inputs()
    rows = []
    plain = saved_nbytes(ours(f"lora(r={RANK})"), x) + x.nbytes
    for text in (
        f"wanda(0.5) >> lora(r={RANK}) >> remask",
        f"nf4 >> lora(r={RANK}) >> regrid",
        f"int(bits=4, group=64) >> lora(r={RANK}) >> regrid",
        f"wanda(0.5) >> int(bits=4, group=64) >> lora(r={RANK}) >> remask >> regrid",
    ):
        mine = ours(text)
        functions = {"ours": step(mine, x, grad), "naive": step(Naive(mine), x, grad)}
        if text.endswith("lora(r=8) >> remask"):
            functions["naive bf16"] = step(NaiveMask(mine), x, grad)
        found = medians(functions, max(5, rounds // 3))
        rows += [Row(f"{text} / {k} autograd", found["ours"], found[k], 1.0) for k in functions if k != "ours"]
        kept = saved_nbytes(mine, x) + x.nbytes
        rows.append(Row("    bytes saved / lora's (MB)", kept / 2**20, plain / 2**20, 1.05))
    return rows


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(BF16)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def whole_model(rounds: int) -> list[Row]:
    """A training step of a Llama, 768 wide, 12 layers, 1024 tokens."""
    from dovetail.training.peak_memory import PeakMemory

    ids = torch.randint(2048, (2, 512), generator=torch.Generator().manual_seed(0))
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR)
    mine = llama()
    dovetail.apply(mine, f"lora(r={RANK}) >> ia3")
    models = {"ours": mine, "defaults": peers(lora, llama(), bf16=False), "bf16": peers(copy.deepcopy(lora), llama())}

    def train(model: nn.Module):
        model.train()

        def run() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            for parameter in model.parameters():
                parameter.grad = None

        return run

    found = medians({name: train(model) for name, model in models.items()}, max(5, rounds // 4), warmup=1)
    peaks = {}
    for name, model in models.items():
        with PeakMemory([*model.parameters(), *model.buffers()]) as peak:
            train(model)()
        peaks[name] = peak.peak_nbytes / 2**20
    return [
        Row("lora >> ia3 / peft lora, its defaults", found["ours"], found["defaults"], 0.85),
        Row("lora >> ia3 / peft lora, bf16 adapters", found["ours"], found["bf16"], 1.05),
        Row("    peak memory / peft's defaults (MB)", peaks["ours"], peaks["defaults"], 1.0),
        Row("    peak memory / peft's bf16 adapters (MB)", peaks["ours"], peaks["bf16"]),
    ]


TABLES = {"layer": layer, "quantized": quantized, "closed": closed, "model": whole_model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default=",".join(TABLES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only.split(","):
        show(name, TABLES[name](arguments.rounds), arguments.json)


if __name__ == "__main__":
    main()
