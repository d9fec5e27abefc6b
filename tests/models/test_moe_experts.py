"""MoE experts in three-dimensional parameters: opened, compressed, trained, merged and saved like any other layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import dovetail
import todays_families
from dovetail.chains.layer.attach import close_experts, open_experts
from dovetail.chains.layer.linear import chain_layers
from dovetail.compression.blocks import LEAST_TOKENS
from dovetail.errors import CalibrationWarning, ChainError, DataError
from dovetail.models.experts import Experts
from dovetail.models.targets import all_layers, find_targets, routers
from families import move
from small_models import make_tokenizer

LLAMA = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**LLAMA, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **LLAMA, head_dim=16, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=3
    ),
    "gpt_oss": lambda: GptOssConfig(**LLAMA, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2),
    "llama4": lambda: Llama4TextConfig(
        **LLAMA,
        head_dim=16,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        no_rope_layers=[1, 0],
    ),
}
SPARSE_INT4 = "wanda(0.5) >> gptq(bits=4, group=32) >> lora(r=4) >> remask >> regrid"


def make(name: str) -> PreTrainedModel:
    """A tiny model whose experts differ by far more than rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
    return model


def batch(rows: int = 8, tokens: int = 24) -> dict[str, Tensor]:
    """Token ids with padding at the end of half of the rows."""
    ids = torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, tokens // 2 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch()).logits


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_opened_experts_compute_what_the_stock_ones_do(name: str, implementation: str) -> None:
    model = make(name)
    if name != "llama4":  # which has one implementation
        model.set_experts_implementation(implementation)
    before, stock = outputs(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    open_experts(model, all_layers(model))
    assert sum(isinstance(module, Experts) for module in model.modules()) == 2
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == memory  # views
    assert torch.equal(outputs(model), before)
    close_experts(model)
    assert list(model.state_dict()) == list(stock)
    assert all(torch.equal(tensor, stock[key]) for key, tensor in model.state_dict().items())
    assert not any(isinstance(module, Experts) for module in model.modules())
    assert torch.equal(outputs(model), before)


def test_names_and_labels() -> None:
    model = make("gpt_oss")
    names = [target.name for target in find_targets(model)]
    assert "model.layers.0.mlp.experts.gate_up_proj.3" in names
    assert not any("router" in name for name in names)
    assert len(names) == 2 * (4 + 2 * 4)
    assert [t.name for t in find_targets(model, "experts.down_proj.*")] == [n for n in names if ".down_proj." in n]
    assert {t.roles for t in find_targets(model, "gate")} == {("gate", "up")}
    assert all(target.feedforward for target in find_targets(model, "down"))
    assert len(find_targets(model, ["all-linear", "!experts.*.1", "!experts.*.2"])) == 2 * (4 + 2 * 2)
    assert routers(make("qwen3_moe")) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


class Apart(nn.Module):
    """One expert's matrix as a plain linear layer."""

    def __init__(self, weight_oi: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight_oi.shape[1], weight_oi.shape[0], bias=False, dtype=weight_oi.dtype)
        self.layer.weight = nn.Parameter(weight_oi.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("text", ["gptq(bits=4, group=32)", "wanda(0.5)", "sparsegpt(0.5)"])
def test_an_expert_is_compressed_as_a_plain_layer_with_the_tokens_routed_to_it(text: str) -> None:
    """GPTQ of Qwen3-MoE's experts in float64 against GPTQ of each matrix apart, padding left out."""
    model, seen = make("qwen3_moe").double(), {}
    model.set_experts_implementation("eager")
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(lambda m, args, number=number: seen.setdefault(number, args))
    outputs(model)
    kept, wanted = batch()["attention_mask"].flatten().bool(), {}
    for number, (hidden, index, _) in seen.items():
        experts = model.model.layers[number].mlp.experts
        for e in range(experts.num_experts):
            x = hidden[(index == e).any(-1) & kept]
            assert len(x) >= LEAST_TOKENS
            gate, up = nn.functional.linear(x, experts.gate_up_proj[e]).chunk(2, dim=-1)
            inputs = {"gate_up_proj": x, "down_proj": nn.functional.silu(gate) * up}
            for name, rows in inputs.items():
                apart = Apart(experts.get_parameter(name)[e].detach())
                dovetail.apply(apart, text, calibration=[{"x": rows}])
                found = chain_layers(apart)["layer"].base.matrix()
                wanted[f"model.layers.{number}.mlp.experts.{name}.{e}"] = found
    dovetail.apply(model, text, targets="experts.*", calibration=[batch()], calibration_inputs="original")
    assert chain_layers(model).keys() == wanted.keys()
    for name, layer in chain_layers(model).items():
        assert (layer.base.matrix() - wanted[name]).abs().max() <= 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sparse_int4_chain_merges_bit_for_bit_and_stock_transformers_loads_it(name: str, tmp_path: Path) -> None:
    model = make(name)
    dovetail.apply(model, SPARSE_INT4, calibration=[batch()])
    move(model)
    tuned = outputs(model)
    dovetail.save_adapter(model, tmp_path / "adapter")
    report = dovetail.merge(model, packed=True)
    assert report.exact
    assert report.max_abs_logit_diff == report.max_abs_weight_diff == report.off_grid == 0
    assert report.sparsity_after >= 0.5 - 1e-3
    assert report.footprint.covered_fraction > 0.8
    assert torch.equal(outputs(model), tuned)
    tokenizer = make_tokenizer()
    dovetail.save_packed(model, tmp_path / "packed", tokenizer=tokenizer)
    packed, _ = dovetail.load(tmp_path / "packed")
    assert torch.equal(outputs(packed), tuned)
    dovetail.to_stock(model)
    assert list(model.state_dict()) == list(make(name).state_dict())
    assert torch.equal(outputs(model), tuned)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(stock), tuned)
    other = make(name)
    dovetail.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(outputs(other), tuned)
    again, _ = dovetail.load(tmp_path / "model")
    dovetail.apply(again, "lora(r=4) >> remask >> regrid")  # a second round, on the grids and zeros of the first
    move(again)
    second = dovetail.merge(again)
    assert second.exact
    assert second.off_grid == 0


def test_training_reaches_the_experts_that_get_tokens() -> None:
    model = make("qwen3_moe")
    dovetail.apply(model, "lora(r=2)", targets=["experts.*"])
    move(model)
    outputs_of = model(**batch(), labels=batch()["input_ids"])
    outputs_of.loss.backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad]
    assert all(reached)
    assert len(reached) == 2 * 2 * 2 * 6


def test_an_expert_without_tokens_is_named_and_compressed_as_without_data() -> None:
    small = {key: tensor[:1, :1] for key, tensor in batch().items()}  # one token, for three of six experts
    few = r"24 experts get fewer than 8 .*layers\.0\.mlp\.experts\.gate_up_proj 0, 1, 2, 3, 4, 5;"
    with pytest.warns(CalibrationWarning, match=few):
        dovetail.apply(make("qwen3_moe"), "gptq(bits=4, group=32)", targets="experts.*", calibration=[small])
    nearest = make("qwen3_moe")
    with pytest.warns(CalibrationWarning, match="no calibration token"):
        dovetail.apply(nearest, "wanda(0.5)", targets="experts.*", calibration=[small])
    magnitude = make("qwen3_moe")
    dovetail.apply(magnitude, "magnitude(0.5, per=row)", targets="experts.*")
    found, wanted = chain_layers(nearest), chain_layers(magnitude)
    equal = [torch.equal(found[name].base.matrix(), wanted[name].base.matrix()) for name in found]
    assert sum(equal) == 2 * 2 * 3


def test_a_failure_before_compression_leaves_the_stock_model() -> None:
    model = make("mixtral")
    stock, before = list(model.state_dict()), outputs(model)
    broken = batch()
    broken["input_ids"] = broken["input_ids"] + 1000
    with pytest.raises(dovetail.DovetailError):
        dovetail.apply(model, "gptq(bits=4, group=32)", calibration=[broken])
    with pytest.raises(ChainError, match="group must divide"):
        dovetail.apply(model, "int(bits=4, group=48)")
    assert list(model.state_dict()) == stock
    assert torch.equal(outputs(model), before)


def test_peft_refuses_an_expert_by_name(tmp_path: Path) -> None:
    model = make("mixtral")
    dovetail.apply(model, "lora(r=2)")
    with pytest.raises(ChainError, match=r"experts\.gate_up_proj\.0, an expert"):
        dovetail.export_peft(model, tmp_path)


def test_experts_that_cannot_tell_padding_refuse_it() -> None:
    model = todays_families.make("jetmoe")
    stock = list(model.state_dict())
    with pytest.raises(DataError, match="a batch with padding"):
        dovetail.apply(model, "wanda(0.5)", calibration=[batch()])
    assert list(model.state_dict()) == stock
    dovetail.apply(model, "wanda(0.5)", calibration=[todays_families.batch()])
