"""The extrapolation over repeated blocks against the simulation of all of them: equal to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3MoeConfig

from dovetail.chains.notation import chain
from dovetail.checkpoint.config import empty_model
from dovetail.compression.apply import apply_on_meta
from dovetail.training.optimizer import TrainSettings
from dovetail.training.peak_memory import PeakMemory
from dovetail.training.predict import predict_peak_memory, predict_unreached, simulate
from dovetail.training.repeats import NotRepeated, find_repeats
from families import CONFIGS, ENCODERS

PLAIN, CHECKPOINTED, BF16 = (
    TrainSettings(),
    TrainSettings(gradient_checkpointing=True),
    TrainSettings(bf16=True),
)
MAIN = "wanda(0.5) >> gptq(bits=4, group=32) >> lora(r=2) >> remask >> regrid"


def config_of(name: str, blocks: int, **changes: Any) -> Any:
    config: Any = CONFIGS[name]()
    values: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    decoder = {"num_decoder_layers": blocks} if config.is_encoder_decoder else {}
    return type(config)(**values | {depth: blocks} | decoder | changes)


def planned(config: Any, text: str, kind: str = "generation") -> tuple[Any, dict[str, torch.Tensor]]:
    model = apply_on_meta(empty_model(config, task_kind=kind), text)
    ids = torch.ones(2, 8, dtype=torch.int64)
    labels = ids if kind == "generation" else torch.zeros(2, dtype=torch.int64)
    return model, {"input_ids": ids, "attention_mask": ids, "labels": labels}


@pytest.mark.parametrize(
    ("name", "blocks", "text", "settings"),
    [
        ("llama", 5, MAIN, CHECKPOINTED),
        ("llama", 6, "nf4(double=true) >> lora(r=2) >> regrid", BF16),
        ("gpt2", 6, "vera(r=2)", CHECKPOINTED),
        ("bloom", 5, "int(bits=4, group=32) >> lora(r=2) >> regrid(start=codes)", BF16),
        ("t5", 6, "lora(r=2)", PLAIN),
        ("bert", 5, "fp8 >> lora(r=2)", CHECKPOINTED),
    ],
)
def test_equal_to_the_simulation_of_all_blocks(name: str, blocks: int, text: str, settings: TrainSettings) -> None:
    model, batch = planned(config_of(name, blocks), text, "classification" if name in ENCODERS else "generation")
    assert find_repeats(model)
    assert simulate(model, batch, settings, whole=False) == simulate(model, batch, settings)


def test_few_blocks_are_all_simulated() -> None:
    model, _ = planned(config_of("llama", 4), "ia3")
    assert find_repeats(model) == []  # then `simulate` does the same with and without `whole`


def test_kinds_that_alternate_are_units() -> None:
    kinds = ["sliding_attention", "full_attention"] * 4
    config = config_of("gemma2", 8, layer_types=kinds)
    model, batch = planned(config, "lora(r=2)")
    (repeat,) = find_repeats(model)
    assert (len(repeat.window), len(repeat.skipped)) == (2, 2)
    assert simulate(model, batch, PLAIN, whole=False) == simulate(model, batch, PLAIN)


def test_dense_blocks_before_blocks_of_experts() -> None:
    model, batch = planned(
        Qwen3MoeConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=7,
            num_attention_heads=4, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, mlp_only_layers=[0, 1],
        ),
        "lora(r=2)",
    )  # fmt: skip
    (repeat,) = find_repeats(model)
    assert repeat.window.start > 2
    assert simulate(model, batch, BF16, whole=False) == simulate(model, batch, BF16)


def test_blocks_that_differ_are_all_simulated() -> None:
    model, batch = planned(config_of("llama", 6), "lora(r=2)")
    model.model.layers[2].requires_grad_(False)
    assert find_repeats(model) == []
    model.requires_grad_(True)  # all alike again, except for a weight that two of them share
    model.model.layers[3].input_layernorm.weight = model.model.layers[4].input_layernorm.weight
    assert find_repeats(model) == []
    assert predict_peak_memory(model, batch, PLAIN) == simulate(model, batch, PLAIN)


class Echo(nn.Module):
    """A block that keeps what it computed beyond a step: it leaves more behind than its gradients."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.kept = block, []

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = self.block(hidden_states, **kwargs)
        self.kept.append(output.detach().clone())
        return output


def test_what_blocks_leave_behind_is_noticed() -> None:
    model, batch = planned(config_of("llama", 5), "lora(r=2)")
    model.model.layers = nn.ModuleList(Echo(block) for block in model.model.layers)
    assert find_repeats(model)
    with pytest.raises(NotRepeated, match="leave more behind"):
        simulate(model, batch, PLAIN, whole=False)
    assert predict_peak_memory(model, batch, PLAIN) == simulate(model, batch, PLAIN)


def test_unreached_layers_are_found_behind_skipped_blocks() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2
    )
    model = empty_model(config)
    model.model.spare = nn.ModuleList(nn.Linear(32, 32, device="meta") for _ in range(8))
    ids = torch.ones(1, 4, dtype=torch.int64)
    names = [f"model.layers.{place}.mlp.up_proj" for place in range(8)]
    assert predict_unreached(model, names, {"input_ids": ids}) is None
    model = empty_model(config)
    model.model.spare = nn.ModuleList(nn.Linear(32, 32, device="meta") for _ in range(8))
    names += [f"model.spare.{place}" for place in range(8)]
    assert predict_unreached(model, names, {"input_ids": ids}) == "model.spare.0"


@pytest.mark.parametrize("text", ["nf4(double=true)", "fp4", "int(bits=4, group=64)", "int(bits=8, group=0)", "fp8"])
def test_a_dry_run_knows_what_work_on_a_grid_needs(text: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    link: Any = chain(text).links[0]
    grid = link.quantize(weight)
    inside, out = torch.empty(512, 512, dtype=torch.bool), torch.empty(512, 512)
    for work in (lambda: grid.dequantize(out), lambda: grid.snap_(weight.clone(), 0, inside)):
        work()  # the tables, which are kept
        with PeakMemory([*grid.buffers(), weight, inside, out]) as memory:
            before = memory.live_nbytes
            work()
        most = 17 * grid.rows_per_chunk * 512 + weight.nbytes  # snap_ gets a copy
        assert memory.peak_nbytes - before <= most
