"""Chains whose arguments differ between layers keep every promise of a chain that is the same on all layers."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import dovetail
from dovetail.chains.assignment import assign
from dovetail.chains.layer.applied import applied
from dovetail.checkpoint.load import load
from dovetail.checkpoint.packed import save_packed
from dovetail.errors import ChainError, RecipeError, TargetError
from dovetail.experts import TaskVector, task_vector
from dovetail.runs.plan import plan
from dovetail.runs.recipe import Recipe
from dovetail.training.optimizer import learning_rates
from dovetail.training.settings import TrainSettings
from small_models import make_tokenizer

torch.set_num_threads(1)
SMALL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, **SMALL}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(max_position_embeddings=32, **LLAMA)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(max_position_embeddings=32, **LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_inner=48, n_layer=2, n_head=2, n_positions=32, **SMALL)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0, **SMALL)
    ),
    "minilm": lambda: BertForSequenceClassification(BertConfig(max_position_embeddings=32, num_labels=2, **LLAMA)),
}
QUANTIZERS = {
    "int": ("int(bits=4, group=16)", "int(bits=8, group=0)", "int(bits=2, group=8)"),
    "gptq": ("gptq(bits=4, group=16)", "gptq(bits=8, group=0)", "gptq(bits=3, group=8, symmetric=true)"),
    "nf4": ("nf4", "nf4(block=32)", "nf4(double=true)"),
    "fp8": ("fp8", "fp8(scale=tensor)", "fp8"),
}
ADAPTERS = {
    "lora": ("lora(r=4)", "lora(r=8, alpha=4)", "lora(r=2, elastic=[2, 1])"),
    "dora": ("dora(r=4)", "dora(r=8)", "dora(r=2)"),
    "loha": ("loha(r=2)", "loha(r=4)", "loha(r=1)"),
    "vera": ("vera(r=8)", "vera(r=16, d_initial=0.2)", "vera(r=4)"),
    "ia3": ("ia3", "ia3(side=in)", "ia3(side=out)"),
}


def make(family: str):
    torch.manual_seed(3)
    return FAMILIES[family]().eval()


def batch(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 40, (4, 12), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {})}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits


def mixed(family: str, *parts: tuple[str, str, str]):
    """A model under the first of each part, the second on the down layers, the third on some layers of a block."""
    common, down, last = (" >> ".join(texts) for texts in zip(*parts, strict=True))
    model = make(family)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".1." in name]
    names = names or [name for name, _ in model.named_modules() if name.endswith("h.1.attn.c_attn")]
    layers = {"down": down, names[0]: last, names[-1]: last}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dovetail.apply(model, common, layers=layers, calibration=[batch(model)] * 2)
    generator = torch.Generator().manual_seed(7)
    for layer in applied(model).layers.values():
        for parameter in layer.links.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, common, layers


CASES = [
    *[(family, q, a, "regrid") for family in FAMILIES for q, a in (("int", "lora"), ("gptq", "dora"))],
    *[
        ("llama", quantizer, adapter, ("", "regrid")[(row + column) % 2])
        for row, quantizer in enumerate(QUANTIZERS)
        for column, adapter in enumerate(ADAPTERS)
    ],
]


@pytest.mark.parametrize(("family", "quantizer", "adapter", "constraint"), dict.fromkeys(CASES))
def test_mixed_layers_compute_their_definition_and_merge(tmp_path, family, quantizer, adapter, constraint):
    parts = [QUANTIZERS[quantizer], ADAPTERS[adapter], *([(constraint,) * 3] if constraint else [])]
    model, common, layers = mixed(family, *parts)
    record = applied(model)
    assert len({str(record.assignment.at(name)) for name in record.layers}) == 3
    for name, layer in record.layers.items():
        assert [str(state.link) for state in layer.states] == list(map(str, record.stage_at(name).trained))
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        weight, bias = layer.effective_weight()
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-5)
    found = dovetail.footprint(model)
    planned = plan(common, model.config, layers=layers, memory=False,
                   task_kind="classification" if family == "minilm" else "generation")  # fmt: skip
    assert planned.legal, planned.problem
    assert (planned.nbytes, planned.bits_per_weight) == (found.nbytes, found.bits_per_weight)
    assert planned.layers == record.assignment.texts
    assert list(learning_rates(model, TrainSettings())) == [
        f"{adapter}, link 1",
        *(["heads"] if family == "minilm" else []),
    ]

    before = logits(model)
    dovetail.save_adapter(model, tmp_path / "adapter")
    again = dovetail.load_adapter(make(family), tmp_path / "adapter")
    assert torch.equal(logits(again), before)
    assert applied(again).assignment.texts == record.assignment.texts
    assert torch.equal(logits(dovetail.load_adapter(model, tmp_path / "adapter")), before)
    if not constraint:
        with pytest.raises(dovetail.errors.CannotMerge):
            dovetail.merge(model)
        return
    report = dovetail.merge(model, packed=True)
    assert report.exact
    assert report.max_abs_logit_diff == 0
    assert torch.equal(logits(model), before)
    assert report.off_grid == 0
    if family != "minilm":
        save_packed(model, tmp_path / "packed", tokenizer=make_tokenizer())
        assert torch.equal(logits(load(tmp_path / "packed")[0]), before)


def test_a_sparse_mixed_chain_merges_without_any_difference():
    wanda = ("wanda(0.5)", "wanda(0.25)", "wanda(0.7)")
    closed = [("remask",) * 3, ("regrid",) * 3]
    model, _, _ = mixed("llama", wanda, QUANTIZERS["gptq"], ADAPTERS["lora"], *closed)
    before = logits(model)
    report = dovetail.merge(model)
    assert (report.exact, report.max_abs_logit_diff, report.max_abs_weight_diff, report.off_grid) == (True, 0, 0, 0)
    assert report.sparsity_after == report.sparsity_before
    assert torch.equal(logits(model), before)


def test_a_mixed_merged_folder_is_continued_on_the_grid_of_each_layer(tmp_path):
    model, _, _ = mixed("llama", QUANTIZERS["int"], ADAPTERS["lora"], ("regrid",) * 3)
    dovetail.merge(model)
    model.save_pretrained(tmp_path)
    for changed in (model, load_stock(tmp_path)):
        dovetail.apply(changed, "lora(r=4) >> regrid")
        bits = {name: layer.base.quantized.bits for name, layer in applied(changed).layers.items()}
        assert {4, 8, 2} == set(bits.values())
        assert torch.equal(logits(changed), logits(LlamaForCausalLM.from_pretrained(tmp_path)))
        dovetail.save_adapter(changed, tmp_path / "adapter")
        assert torch.equal(logits(dovetail.load_adapter(load_stock(tmp_path), tmp_path / "adapter")), logits(changed))
    planned = plan("lora(r=4) >> regrid", tmp_path, memory=False)
    assert planned.nbytes == dovetail.footprint(changed).nbytes


def load_stock(folder):
    from dovetail.chains.layer.held import read_grids

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    read_grids(folder, model)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_mixed_ranks_go_to_peft_and_come_back(tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel

    model, _, _ = mixed("llama", ("lora(r=4)", "lora(r=8, alpha=4)", "lora(r=2, alpha=8)"))
    before = logits(model)
    dovetail.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) | {config["r"]} == {4, 8, 2}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make("llama"), tmp_path)), before)
    torch.testing.assert_close(logits(dovetail.import_peft(make("llama"), tmp_path)), before)


def test_the_last_pattern_that_fits_decides():
    layers = {"all-linear": "lora(r=1)", "down": "lora(r=2)", "layers.1.*": "lora(r=3)"}
    model = dovetail.apply(make("llama"), "lora(r=8)", layers=layers)
    ranks = {name: layer.states[0].link.r for name, layer in applied(model).layers.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 1
    assert ranks["model.layers.0.mlp.down_proj"] == 2
    assert ranks["model.layers.1.mlp.down_proj"] == 3
    assert [model_.r for model_ in applied(model).assignment.at("elsewhere")] == [8]


@pytest.mark.parametrize(
    ("common", "layers", "error", "message"),
    [
        ("int(bits=4) >> lora(r=4)", {"down": "lora(r=4)"}, ChainError, "same links|the links of"),
        ("int(bits=4) >> lora(r=4)", {"down": "gptq(bits=4) >> lora(r=4)"}, ChainError, "only arguments may differ"),
        ("lora(r=4)", {"nowhere": "lora(r=8)"}, TargetError, "nowhere"),
        ("lora(r=4)", {"down": "lora(r=0)"}, ChainError, "found: r=0"),
        ("int(bits=4, group=16) >> lora >> regrid", {"down": "int(bits=4, group=7) >> lora >> regrid"}, ChainError,
         "down_proj"),
    ],
)  # fmt: skip
def test_bad_assignments_are_refused_before_anything_changes(common, layers, error, message):
    model = make("llama")
    before = logits(model)
    with pytest.raises(error, match=message):
        dovetail.apply(model, common, layers=layers)
    assert torch.equal(logits(model), before)
    assert not plan(common, model.config, layers=layers, memory=False).legal


def test_another_assignment_is_another_chain(tmp_path):
    model, common, _ = mixed("llama", QUANTIZERS["int"], ADAPTERS["lora"])
    dovetail.save_adapter(model, tmp_path)
    with pytest.raises(dovetail.errors.LoadError, match="must carry the adapter's chain"):
        dovetail.load_adapter(dovetail.apply(make("llama"), common), tmp_path)
    file = json.loads((tmp_path / "adapter.json").read_text())
    file["layers"]["down"] = common
    (tmp_path / "adapter.json").write_text(json.dumps(file))
    with pytest.raises(dovetail.errors.LoadError, match="digest"):
        dovetail.load_adapter(make("llama"), tmp_path)


def test_an_adapter_without_layers_has_the_digest_of_earlier_versions(tmp_path):
    dovetail.save_adapter(dovetail.apply(make("llama"), "lora(r=4)"), tmp_path)
    file = json.loads((tmp_path / "adapter.json").read_text())
    assert file.pop("layers") == {}
    (tmp_path / "adapter.json").write_text(json.dumps(file))
    dovetail.load_adapter(make("llama"), tmp_path)


def test_experts_of_mixed_chains_keep_their_layers():
    model, _, _ = mixed("llama", QUANTIZERS["int"], ADAPTERS["lora"])
    vector = task_vector(model)
    assert isinstance(vector, TaskVector)
    assert vector.origin.adapter["layers"] == applied(model).assignment.texts


def test_layers_in_recipes():
    recipe = Recipe.parse(
        {"model": "playground", "chain": "lora(r=4)", "layers": {"down": "lora( r = 8 )"}, "data": "word_problems"}
    )
    assert recipe.layers == {"down": "lora(r=8)"}
    with pytest.raises(RecipeError, match="layers"):
        Recipe.parse({"model": "playground", "chain": "lora(r=4)", "layers": ["down"], "data": "word_problems"})


def test_an_assignment_says_what_it_holds():
    found = assign("lora(r=4)", {"down": "lora(r=8)"})
    assert str(found) == "lora(r=4), down: lora(r=8)"
    assert found.texts == {"down": "lora(r=8)"}
    assert dataclasses.is_dataclass(found)
