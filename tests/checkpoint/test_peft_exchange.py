"""Adapters in peft's format: stock peft loads what we write, we load what it writes, with the same logits.

The models are the tiny ones of `families.py`; both sides start from the same weights, made twice from one seed.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dovetail
from dovetail.chains import registry
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.elastic import groups
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import always_print
from dovetail.chains.registry import links
from dovetail.chains.terms import LowRank
from dovetail.checkpoint.formats.peft import export_peft, import_peft
from dovetail.errors import ChainError, DovetailError, LoadError
from dovetail.links.adapt import LoRA
from dovetail.links.adapt.rank import RankAdapter
from families import batch, logits, make
from places import ROOT

CLOSE = 8 * torch.finfo(torch.float32).eps
"""Largest difference of logits in float64, over the largest logit or 1. Some norms and rotary embeddings of a model in
float64 round to float32, where a difference in the last bit of float64 may become one of float32. The models have two
blocks with at most three of them each, one after the blocks, and one of the rotary embedding."""
FAMILIES = ["llama", "qwen2", "gpt2", "t5", "bert", "phi3"]
DOWN = {
    "llama": "mlp.down_proj", "qwen2": "mlp.down_proj", "phi3": "mlp.down_proj", "gpt2": "mlp.c_proj",
    "t5": "DenseReluDense.wo", "bert": "output.dense",
}  # fmt: skip
ATTENTION = {
    "llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "phi3": ["qkv_proj"], "gpt2": ["attn.c_attn"],
    "t5": ["q", "v"], "bert": ["query", "value"],
}  # fmt: skip
CHAINS = {
    "lora": "lora(r=4, alpha=6, dropout=0.1)",
    "rslora": "lora(r=4, alpha=6, scaling=rs)",
    "dora": "dora(r=4, alpha=6)",
    "rsdora": "dora(r=4, alpha=6, scaling=rs)",
    "ia3": "ia3",
    "loha": "loha(r=3, alpha=5)",
    "vera": "vera(r=6, seed=7)",
}
ELASTIC = [
    "lora(r=6, elastic=[6, 4, 2])",
    "lora(r=6, alpha=5, scaling=rs, elastic=[6, 4, 2])",
    "dora(r=6, elastic=[6, 4, 2])",
    "loha(r=6, alpha=4, elastic=[6, 4, 2])",
]
CONFIGS: dict[str, Callable[..., peft.PeftConfig]] = {
    "lora": lambda **k: peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **k),
    "rslora": lambda **k: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **k),
    "dora": lambda **k: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **k),
    "rsdora": lambda **k: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=True, **k),
    "ia3": lambda **k: peft.IA3Config(**k),
    "loha": lambda **k: peft.LoHaConfig(r=3, alpha=5, **k),
    "vera": lambda **k: peft.VeraConfig(r=6, projection_prng_key=7, **k),
}
NO_LOHA = "gpt2"
"""peft's LoHa takes no Conv1D."""
# What peft itself says while it loads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def perturb(model: nn.Module, by: float = 0.1) -> None:
    """Every trained parameter moves, a new head's too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)


def last_answer(model: Any) -> Tensor:
    """The logits of a model on one batch, in eval mode and float64: no order of summation is seen in them.

    The model is of float64 afterwards.
    """
    model = model.double().eval()
    with torch.no_grad():
        return logits(model, batch(model))


def answer(model: Any) -> Tensor:
    """The same, which leaves the model unchanged."""
    return last_answer(copy.deepcopy(model))


@functools.cache
def base_answer(family: str = "llama") -> Tensor:
    """The logits of the model without an adapter."""
    return last_answer(make(family))


def stock(directory: Path, family: str = "llama") -> Any:
    """What stock peft makes of a directory, on a fresh base."""
    return peft.PeftModel.from_pretrained(make(family), str(directory))


@torch.no_grad()
def same(found: Tensor, wanted: Tensor, base: Tensor) -> None:
    assert (wanted - base).abs().max() > 1e-3, "the adapter does something"
    assert (found - wanted).abs().max() <= CLOSE * max(1.0, wanted.abs().max().item())


def under(family: str, text: str, **arguments: Any) -> Any:
    model = dovetail.apply(make(family), text, **arguments)
    perturb(model)
    return model


def theirs(family: str, config: peft.PeftConfig, directory: Path, by: float = 0.1) -> Tensor:
    """Trains nothing, but moves everything, and saves; returns its logits."""
    model = peft.get_peft_model(make(family), config)
    perturb(model, by)
    model.create_or_update_model_card = lambda directory: None  # its template takes longer than the rest
    model.save_pretrained(str(directory))
    return last_answer(model)


def config_of(method: str, family: str, **more: Any) -> peft.PeftConfig:
    targets = [*ATTENTION[family], DOWN[family]]
    if method == "ia3":
        more["feedforward_modules"] = [DOWN[family]]
    if family == "bert":
        more["task_type"] = "SEQ_CLS"
    return CONFIGS[method](target_modules=targets, **more)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CHAINS)
def test_stock_peft_loads_what_we_write(method: str, family: str, tmp_path: Path) -> None:
    if (method, family) == ("loha", NO_LOHA):
        pytest.skip("refused, see test_refusals")
    model = under(family, CHAINS[method])
    wanted = answer(model)
    assert export_peft(model, tmp_path / "adapter") == tmp_path / "adapter"
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    same(last_answer(stock(tmp_path / "adapter", family)), wanted, base_answer(family))
    same(last_answer(import_peft(make(family), tmp_path / "adapter")), wanted, base_answer(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_we_load_what_stock_peft_writes(method: str, family: str, tmp_path: Path) -> None:
    if (method, family) == ("loha", NO_LOHA):
        pytest.skip("peft's LoHa takes no Conv1D")
    wanted = theirs(family, config_of(method, family), tmp_path)
    model = import_peft(make(family), tmp_path)
    same(answer(model), wanted, base_answer(family))
    # And back, through both formats.
    export_peft(model, tmp_path / "again")
    same(last_answer(stock(tmp_path / "again", family)), wanted, base_answer(family))
    dovetail.save_adapter(model, tmp_path / "ours")
    assert torch.equal(last_answer(dovetail.load_adapter(make(family), tmp_path / "ours")), answer(model))


def mixed_ranks(family: str, text: str) -> Any:
    """A model under an elastic chain that runs at several ranks."""
    model = under(family, text)
    for turn, group in enumerate(groups(model)):
        group.use_rank(group.ranks[turn % len(group.ranks)])
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("text", ELASTIC)
def test_elastic_adapter_is_written_at_the_ranks_that_it_runs_at(text: str, family: str, tmp_path: Path) -> None:
    if text.startswith("loha") and family == NO_LOHA:
        pytest.skip("peft's LoHa takes no Conv1D")
    model = mixed_ranks(family, text)
    wanted, base = answer(model), base_answer(family)
    export_peft(model, tmp_path / "running")
    same(last_answer(stock(tmp_path / "running", family)), wanted, base)
    dovetail.extract(model)
    export_peft(model, tmp_path / "extracted")
    same(last_answer(stock(tmp_path / "extracted", family)), wanted, base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "running" / name).read_bytes() == (tmp_path / "extracted" / name).read_bytes()
    config = json.loads((tmp_path / "running/adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {6, 4, 2}
    again = import_peft(make(family), tmp_path / "running")
    same(answer(again), wanted, base)
    dovetail.save_adapter(again, tmp_path / "ours")
    assert torch.equal(last_answer(dovetail.load_adapter(make(family), tmp_path / "ours")), answer(again))


def test_elastic_vera_at_one_rank_is_written_with_its_projections(tmp_path: Path) -> None:
    model = under("llama", "vera(r=8, elastic=[8, 6, 4])")
    export_peft(model, tmp_path)
    same(last_answer(stock(tmp_path)), answer(model), base_answer())
    with pytest.raises(LoadError, match="other values than vera"):
        import_peft(make("llama"), tmp_path)


PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 5, "layers.0.mlp.down_proj": 3},
    "alpha_pattern": {"v_proj": 9, "^model.layers.0.self_attn.q_proj": 3},
}


@pytest.mark.parametrize("patterns", [PATTERNS, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "rsdora", "loha"])
def test_ranks_and_alphas_of_single_layers(method: str, patterns: dict[str, Any], tmp_path: Path) -> None:
    wanted, base = theirs("llama", config_of(method, "llama", **patterns), tmp_path), base_answer()
    model = import_peft(make("llama"), tmp_path)
    same(answer(model), wanted, base)
    assert all(p.requires_grad for layer in chain_layers(model).values() for p in layer.links.parameters())
    dovetail.save_adapter(model, tmp_path / "ours")
    assert torch.equal(last_answer(dovetail.load_adapter(make("llama"), tmp_path / "ours")), answer(model))
    export_peft(model, tmp_path / "again")
    same(last_answer(stock(tmp_path / "again")), wanted, base)


def test_an_adapter_without_scale_stays_one(tmp_path: Path) -> None:
    peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, lora_alpha=0, target_modules=["q_proj"])).save_pretrained(
        str(tmp_path)
    )
    assert torch.equal(last_answer(import_peft(make("llama"), tmp_path)), base_answer())


@pytest.mark.parametrize(
    ("family", "targets", "inputs", "text"),
    [
        ("bert", ["key", "value", "output.dense"], ["output.dense"], None),  # peft's own choice for BERT
        ("llama", ["q_proj", "down_proj"], [], "ia3(side=out)"),
        ("llama", ["q_proj", "up_proj"], ["q_proj", "up_proj"], "ia3(side=in)"),
        ("llama", ["q_proj", "up_proj"], ["up_proj"], 'ia3(side=out, inputs=["model.layers.*.mlp.up_proj"])'),
        ("llama", ["q_proj"], r".*\.0\.self_attn\.q_proj", 'ia3(side=out, inputs=["model.layers.0.self_attn.q_proj"])'),
    ],
)
def test_ia3_on_any_side(
    family: str, targets: list[str], inputs: list[str] | str, text: str | None, tmp_path: Path
) -> None:
    wanted = theirs(family, peft.IA3Config(target_modules=targets, feedforward_modules=inputs), tmp_path, by=2.0)
    model = import_peft(make(family), tmp_path)
    assert text is None or str(next(iter(chain_layers(model).values())).states[0].link) == text
    same(answer(model), wanted, base_answer(family))
    dovetail.save_adapter(model, tmp_path / "ours")
    assert torch.equal(last_answer(dovetail.load_adapter(make(family), tmp_path / "ours")), answer(model))
    export_peft(model, tmp_path / "again")
    same(last_answer(stock(tmp_path / "again", family)), wanted, base_answer(family))


class Nested(nn.Module):
    """Layers whose paths are ends of other layers' paths."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.xlin = nn.Linear(6, 6), nn.Linear(6, 6)
        self.block = nn.ModuleDict({"lin": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["lin"](self.xlin(self.lin(x).tanh()).tanh())


@pytest.mark.parametrize(
    "text", ["lora(r=3, elastic=[3, 2, 1])", "ia3(side=out, inputs=[lin])", "loha(r=2)", "vera(r=4)"]
)
@pytest.mark.parametrize("targets", [["*"], ["xlin", "lin"], ["xlin"]])
def test_paths_that_are_ends_of_others(text: str, targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Nested(), torch.randn(4, 6)
    fresh = copy.deepcopy(model)
    before = model(x)
    dovetail.apply(model, text, targets=targets)
    perturb(model)
    for rank, group in enumerate(groups(model), 1):
        group.use_rank(rank)
    export_peft(model, tmp_path)
    same(peft.PeftModel.from_pretrained(copy.deepcopy(fresh), str(tmp_path))(x), model(x), before)
    same(import_peft(fresh, tmp_path)(x), model(x), before)


def test_a_file_for_the_shorter_path_alone(tmp_path: Path) -> None:
    """peft can say it with a regular expression; our targets can't, and say so."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Nested(), peft.LoraConfig(r=2, target_modules="lin"))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(LoadError, match=r"nothing for block\.lin"):
        import_peft(Nested(), tmp_path)


@dataclass(frozen=True)
class RsLoRA(RankAdapter):
    """A link of another package for one of peft's variants of LoRA: scale alpha / sqrt(r)."""

    r: int = always_print(8)
    alpha: float | None = None
    elastic: tuple[int, ...] = ()

    name: ClassVar[str] = "rslora"
    rank_axes: ClassVar[dict[str, int]] = {"A": 0, "B": 1}
    peft_type: ClassVar[str] = "LORA"
    peft_variant: ClassVar[str] = "use_rslora"
    peft_tensors = LoRA.peft_tensors
    peft_config = LoRA.peft_config
    peft_alpha = LoRA.peft_alpha
    pool = None  # which LoRA's functions read
    parameter_shapes, init, fold = LoRA.parameter_shapes, LoRA.init, LoRA.fold

    def divisor(self, rank: int) -> float:
        return rank**0.5

    def lower(self, p: Mapping[str, Tensor]) -> list[Any]:
        return [LowRank(p["A"], self.scale * p["B"])]

    def peft_fields(self) -> dict[str, Any]:
        return {"use_rslora": True}


def test_an_adapter_of_another_package_declares_its_peft_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links()
    monkeypatch.setitem(registry._REGISTERED, "rslora", RsLoRA)
    model = under("llama", "rslora(r=4, alpha=6)")
    export_peft(model, tmp_path)
    same(last_answer(stock(tmp_path)), answer(model), base_answer())
    again = import_peft(make("llama"), tmp_path)
    assert str(applied(again).chain) == "rslora(r=4, alpha=6)"
    same(answer(again), answer(model), base_answer())


@pytest.mark.parametrize("compressed", ["magnitude(0.5)", "nf4(block=32)", "magnitude(0.5) >> int(bits=4, group=32)"])
def test_over_a_compressed_base(compressed: str, tmp_path: Path) -> None:
    """The adapter belongs to the compressed base: merged alone, it is a checkpoint that peft takes."""
    model = under("llama", f"{compressed} >> lora(r=4)")
    export_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    base = dovetail.apply(make("llama"), compressed)
    dovetail.merge(base)
    before = answer(base)
    same(answer(peft.PeftModel.from_pretrained(base, str(tmp_path))), answer(model), before)
    same(last_answer(import_peft(make("llama"), tmp_path, base=compressed)), answer(model), before)


def test_a_classifier_and_its_pooler_are_saved_whole(tmp_path: Path) -> None:
    model = under("bert", "lora(r=2)", targets="query")
    export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["bert.pooler", "classifier"])
    body: Any = make("bert").base_model
    other: Any = make("bert", seed=1)  # its own head, unlike the body's
    other.bert.encoder, other.bert.embeddings = body.encoder, body.embeddings
    loaded = copy.deepcopy(other)
    same(answer(peft.PeftModel.from_pretrained(other, str(tmp_path))), answer(model), answer(make("bert")))
    same(answer(import_peft(loaded, tmp_path)), answer(model), answer(make("bert")))
    assert loaded.classifier.weight.requires_grad


def test_what_was_trained_beside_is_saved_too(tmp_path: Path) -> None:
    model: Any = dovetail.apply(make("llama"), "lora(r=2)")
    model.model.norm.weight.requires_grad_(True)
    perturb(model)
    export_peft(model, tmp_path)
    same(last_answer(stock(tmp_path)), answer(model), base_answer())
    again: Any = import_peft(make("llama"), tmp_path)
    same(answer(again), answer(model), base_answer())
    assert again.model.norm.weight.requires_grad


def test_a_stage_trained_before_is_part_of_the_base(tmp_path: Path) -> None:
    model = under("llama", "ia3 >> magnitude(0.3) >> lora(r=2)")
    export_peft(model, tmp_path / "first")
    same(last_answer(stock(tmp_path / "first")), answer(model), base_answer())
    dovetail.advance(model)
    perturb(model)
    export_peft(model, tmp_path / "second")
    assert json.loads((tmp_path / "second/adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("text", "family", "message"),
    [
        ("magnitude(0.5) >> lora(r=2) >> remask", "llama", "cannot re-impose the base's zeros"),
        ("nf4(block=32) >> lora(r=2) >> regrid", "llama", "cannot re-impose the base's grid"),
        ("lora(r=2) >> ia3", "llama", "a peft adapter must be one link"),
        ("magnitude(0.5)", "llama", "no adapter"),
        ("bottleneck(r=2)", "llama", "peft has no adapter bottleneck"),
        ("loha(r=2)", "gpt2", "not on GPT-2's Conv1D"),
    ],
)
def test_chains_that_peft_cannot_express(text: str, family: str, message: str, tmp_path: Path) -> None:
    model = dovetail.apply(make(family), text)
    with pytest.raises(ChainError, match=re.escape(message)):
        export_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_more_that_peft_cannot_express(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="no layer with a chain"):
        export_peft(make("llama"), tmp_path)
    with pytest.raises(ChainError, match="peft's VeRA has one rank"):
        export_peft(mixed_ranks("llama", "vera(r=6, elastic=[6, 4])"), tmp_path)
    conv = dovetail.apply(nn.Sequential(nn.Conv1d(3, 4, 2)), "lora(r=2)", targets="*")
    with pytest.raises(ChainError, match="a convolution"):
        export_peft(conv, tmp_path)
    shared = nn.Linear(4, 4)
    twice = dovetail.apply(nn.Sequential(shared, nn.Tanh(), shared), "lora(r=2)")
    with pytest.raises(ChainError, match="0, which has 2 paths"):
        export_peft(twice, tmp_path)
    tied: Any = dovetail.apply(make("gpt2"), "lora(r=2)")
    tied.transformer.wte.weight.requires_grad_(True)
    with pytest.raises(ChainError, match="shared with another module"):
        export_peft(tied, tmp_path)
    head = dovetail.apply(make("bert"), "lora(r=2)", targets="classifier")
    with pytest.raises(ChainError, match="classifier under the chain"):
        export_peft(head, tmp_path)
    assert not list(tmp_path.iterdir())


def test_writing_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_peft(under("llama", "lora(r=2)"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("dovetail.checkpoint.formats.peft.write.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        export_peft(under("llama", "lora(r=4)"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def written(directory: Path, method: str = "lora", **more: Any) -> Path:
    """A stock adapter on q_proj of the tiny Llama."""
    config = CONFIGS[method](
        target_modules=["q_proj"], **({"feedforward_modules": []} if method == "ia3" else {}), **more
    )
    peft.get_peft_model(make("llama"), config).save_pretrained(str(directory))
    return directory


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(directory: Path, message: str, error: type[DovetailError] = LoadError) -> None:
    """import_peft says so, and leaves the model as it was."""
    model = make("llama")
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        import_peft(model, directory)
    assert not chain_layers(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), make("llama").parameters(), strict=True))
    assert trained == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "trained biases of the base"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"target_parameters": ["experts.down_proj"]}, "no linear layer owns"),
        ({"trainable_token_indices": [1, 2]}, "rows of the embedding"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [5]}, "some tokens alone"),
        ({"use_qalora": True}, "averaged in groups"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"invented_in_2031": "yes"}, "invented_in_2031='yes'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights again"),
        ({"init_lora_weights": "loftq"}, "base that LoftQ saved"),
        ({"peft_type": "OFT"}, "peft_type 'OFT'"),
        ({"peft_type": "ADALORA"}, "a file of adalora contains"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"r": 0}, "r: "),
        ({"r": 5}, r"shape \(4, 64\)"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "6; import os"}, "lora_alpha"),
        ({"rank_pattern": {"(a|a)*b": 2}}, "are not run"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj"),
        ({"target_modules": ["v_proj"]}, "target_modules must name every adapted layer"),
        ({"target_modules": ["q_proj", "v_proj"]}, "v_proj missing from the file"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight missing"),
        ({"modules_to_save": ["self_attn"]}, "missing from the file|in modules_to_save"),
        ({"use_dora": True, "lora_dropout": 0}, "lora_magnitude_vector missing"),
    ],
)
def test_configs_that_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    change_config(written(tmp_path), **fields)
    refused(tmp_path, message)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lora_B.weight missing from the file"),
        (lambda t: t.clear(), "no parameter of a layer"),
        (lambda t: t.update({"weight": torch.zeros(1)}), "a tensor 'weight'"),
        (lambda t: t.update({f"{Q}.lora_embedding_A": torch.zeros(1)}), "lora_embedding_A"),
        (lambda t: t.update({"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 64)}), "no such layer"),
        (lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 64)}), "LlamaRMSNorm"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 65)}), r"shape \(4, 65\)"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}), "I8"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 64), torch.nan)}), "NaN or infinity"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(0, 64)}), "shape"),
    ],
)
def test_tensors_that_are_refused(change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    change_tensors(written(tmp_path), change)
    refused(tmp_path, message, DovetailError)


def test_files_that_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "adapter_config.json")
    config, tensors = written(tmp_path) / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good = config.read_bytes()
    for bad in (b"", b"[" * 100_000, b"\xff\xfe{", b"[]", b'{"peft_type": ', b"1" * 5000):
        config.write_bytes(bad)
        refused(tmp_path, "adapter_config.json")
    config.write_bytes(good + b" " * (1 << 20))
    refused(tmp_path, "at most 1048576")
    config.write_bytes(good)
    whole = tensors.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        tensors.write_bytes(whole[:cut])
        refused(tmp_path, "a whole adapter_model.safetensors")
    tensors.rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, "nothing is unpickled")
    (tmp_path / "adapter_model.bin").unlink()
    refused(tmp_path, "a whole adapter_model.safetensors")


def test_other_projections_than_those_of_the_key_are_refused(tmp_path: Path) -> None:
    change_tensors(written(tmp_path, "vera"), lambda t: t["base_model.vera_A"].add_(1e-3))
    refused(tmp_path, "other values than vera")
    change_tensors(tmp_path, lambda t: t.pop("base_model.vera_B"))
    refused(tmp_path, "base_model.vera_B missing")


@pytest.mark.filterwarnings("ignore:Specified to not")
def test_projections_that_were_not_saved(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"], save_projection=False)
    same(theirs("llama", config, tmp_path), last_answer(import_peft(make("llama"), tmp_path)), base_answer())


def test_peft_changes_the_base_where_it_loads_what_is_refused(tmp_path: Path) -> None:
    """The reason of the refusal: with the tensors alone, the logits would be others than peft's."""
    wanted = theirs("llama", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"), tmp_path)
    assert (last_answer(stock(tmp_path)) - wanted).abs().max() < 1e-4
    refused(tmp_path, "init_lora_weights='pissa'")
    change_config(tmp_path, init_lora_weights=True)
    assert (last_answer(import_peft(make("llama"), tmp_path)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "field"), [("dora", "lora_dropout"), ("loha", "rank_dropout"), ("loha", "module_dropout")]
)
def test_dropout_that_no_link_has_is_told(method: str, field: str, tmp_path: Path) -> None:
    written(tmp_path, method, **{field: 0.25})
    with pytest.warns(UserWarning, match=f"{field}=0.25 is ignored"):
        import_peft(make("llama"), tmp_path)


def test_layers_chosen_by_index_or_expression(tmp_path: Path) -> None:
    """The file's tensors say which layers these are."""
    by_index = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers"
    )
    by_expression = peft.LoraConfig(r=2, target_modules=r".*\.1\.self_attn\.(q|v)_proj")
    without = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["down_proj"])
    for turn, config in enumerate((by_index, by_expression, without)):
        wanted = theirs("llama", config, tmp_path / str(turn))
        same(answer(import_peft(make("llama"), tmp_path / str(turn))), wanted, base_answer())


def test_what_import_refuses_of_the_model(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ChainError, match="carries a chain already"):
        import_peft(dovetail.apply(make("llama"), "ia3"), tmp_path)
    with pytest.raises(ChainError, match="pruners and quantizers"):
        import_peft(make("llama"), tmp_path, base="nf4(block=32) >> lora")
    with pytest.raises(LoadError, match="no such layer"):
        import_peft(make("gpt2"), tmp_path)


def test_the_page_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/peft.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert (tmp_path / "adapter/adapter_config.json").exists()
    assert (tmp_path / "base/config.json").exists()
