"""Labels, globs and all-linear on every family; refusals name the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AutoModel, AutoModelForMaskedLM, BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from dovetail.errors import TargetError
from dovetail.models.roles import LABELS, roles_of
from dovetail.models.targets import all_layers, find_targets, fused_experts, heads, labels
from families import FAMILIES, HIDDEN, LAYERS, batch, logits, make

LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
ATTENTION = {label: LLAMA[label] for label in ("query", "key", "value", "output")}
BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def fused(qkv: str, output: str, up: str, down: str, gate: str = "") -> dict[str, str]:
    table = {"query": qkv, "key": qkv, "value": qkv, "output": output, "gate": gate, "up": up, "down": down}
    return {label: path for label, path in table.items() if path}


# Family -> (path of a block, with a star for its number; label -> path of its layer in the block).
EXPECTED: dict[str, tuple[str, dict[str, str]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"), ("model.layers.*", LLAMA)),
    "mixtral": (
        "model.layers.*",
        {**ATTENTION, **dict.fromkeys(("gate", "up"), "mlp.experts.gate_up_proj.#"), "down": "mlp.experts.down_proj.#"},
    ),
    "phi3": (
        "model.layers.*",
        fused("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", gate="mlp.gate_up_proj"),
    ),
    "gpt2": ("transformer.h.*", fused("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": (
        "gpt_neox.layers.*",
        fused("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    **{
        name: (
            "transformer.h.*",
            fused("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        )
        for name in ("bloom", "falcon")
    },
    "opt": ("model.decoder.layers.*", {**ATTENTION, "output": "self_attn.out_proj", "up": "fc1", "down": "fc2"}),
    "bert": ("bert.encoder.layer.*", BERT),
    "roberta": ("roberta.encoder.layer.*", BERT),
    "distilbert": (
        "distilbert.transformer.layer.*",
        {
            "query": "attention.q_lin",
            "key": "attention.k_lin",
            "value": "attention.v_lin",
            "output": "attention.out_lin",
            "up": "ffn.lin1",
            "down": "ffn.lin2",
        },
    ),
}
T5_ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}
T5_PLACES = (
    "encoder.block.*.layer.0.SelfAttention",
    "decoder.block.*.layer.0.SelfAttention",
    "decoder.block.*.layer.1.EncDecAttention",
)
T5_FEEDFORWARD = ("encoder.block.*.layer.1.DenseReluDense", "decoder.block.*.layer.2.DenseReluDense")


def expected(name: str) -> dict[str, set[str]]:
    if name.startswith("t5"):
        inner = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if name == "t5_gated" else {"up": "wi", "down": "wo"}
        paths = {label: [f"{place}.{end}" for place in T5_PLACES] for label, end in T5_ATTENTION.items()}
        paths |= {label: [f"{place}.{end}" for place in T5_FEEDFORWARD] for label, end in inner.items()}
    else:
        block, table = EXPECTED[name]
        paths = {label: [f"{block}.{end}"] for label, end in table.items()}
    return {
        label: {
            path.replace("*", str(i)).replace("#", str(expert))
            for path in paths[label]
            for i in range(LAYERS)
            for expert in range(2)
        }
        for label in LABELS
        if label in paths
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_of_every_family(name: str) -> None:
    model = make(name)
    wanted = expected(name)
    assert {label: set(paths) for label, paths in labels(model).items()} == wanted
    order = [layer.name for layer in all_layers(model)]
    for label, paths in wanted.items():
        targets = find_targets(model, label)
        assert [target.name for target in targets] == sorted(paths, key=order.index)
        for target in targets:
            if target.experts is None:
                assert target.module is model.get_submodule(target.name)
            else:
                path, parameter, number = target.name.rsplit(".", 2)
                stored = model.get_submodule(path).get_parameter(parameter)[int(number)]
                assert target.module.get_parameter("weight").data_ptr() == stored.data_ptr()
            assert label in target.roles
            assert target.feedforward == (target.name in wanted.get("down", ()))
    for label in set(LABELS) - set(wanted):
        with pytest.raises(TargetError, match=label):
            find_targets(model, label)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_is_every_labelled_layer_of_the_known_families(name: str) -> None:
    model = make(name)
    names = [target.name for target in find_targets(model)]
    assert len(names) == len(set(names))
    assert set(names) == set().union(*expected(name).values())
    linear = {layer.name for layer in all_layers(model) if isinstance(layer.module, (nn.Linear, Conv1D))}
    assert linear >= {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    left_out = linear - set(names)
    assert all(any(path == head or path.startswith(f"{head}.") for head in heads(model)) for path in left_out)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_answer_with_finite_logits(name: str) -> None:
    model = make(name)
    with torch.no_grad():
        first, again = logits(model, batch(model)), logits(make(name), batch(model))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)


def test_shapes_of_fused_and_grouped_layers() -> None:
    (qkv, *_) = find_targets(make("gpt2"), "query")
    assert qkv.roles == ("query", "key", "value")
    assert isinstance(qkv.module, Conv1D)
    assert qkv.module.weight.shape == (HIDDEN, 3 * HIDDEN)
    assert find_targets(make("llama"), "key")[0].module.weight.shape == (HIDDEN // 2, HIDDEN)
    assert find_targets(make("phi3"), "up")[0].roles == ("gate", "up")


def test_globs_lists_and_unions() -> None:
    model = make("llama")
    full = [target.name for target in find_targets(model, "model.layers.0.self_attn.*")]
    assert full == [f"model.layers.0.self_attn.{end}_proj" for end in "qkvo"]
    by_end = find_targets(model, "q_proj")
    assert by_end == find_targets(model, "*.q_proj") == find_targets(model, "self_attn.q_proj")
    assert len(by_end) == LAYERS
    assert find_targets(model, "value, query") == find_targets(model, ["query", "value"])  # both in module order
    assert find_targets(model, ["query", "q_proj", "layers.0.*"]) == find_targets(model, "layers.0.*,query")
    assert find_targets(model, ["all-linear", "query"]) == find_targets(model)
    assert [target.name for target in find_targets(model, "lm_head")] == ["lm_head"]  # untied here, so it may be named


def test_heads_stay_out_of_all_linear_and_carry_no_label() -> None:
    for name in ("bert", "roberta", "distilbert"):
        model = make(name)
        assert not any("classifier" in target.name or "pooler" in target.name for target in find_targets(model))
    assert heads(make("bert")) == ["bert.pooler", "classifier"]
    assert heads(make("llama")) == ["lm_head"]
    assert len(find_targets(make("roberta"), "classifier.*")) == 2
    assert "classifier.out_proj" not in labels(make("roberta"))["output"]
    masked = AutoModelForMaskedLM.from_config(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    assert len(find_targets(masked)) == 6


class Wrapped(nn.Module):
    """A PreTrainedModel inside a plain module, as sentence encoders are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = BertModel(
            BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        )
        self.project = nn.Linear(16, 4)


def test_any_module() -> None:
    model = Wrapped()
    names = [target.name for target in find_targets(model)]
    assert "encoder.pooler.dense" not in names
    assert names[-1] == "project"
    assert len(names) == 7
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Conv1D(2, 4))
    assert [(target.name, target.roles) for target in find_targets(plain)] == [("0", ()), ("2", ())]


def test_convolutions_only_by_glob() -> None:
    model = nn.ModuleDict({"conv1": nn.Conv1d(2, 3, 3), "conv2": nn.Conv2d(2, 3, 3), "head": nn.Linear(3, 2)})
    assert [target.name for target in find_targets(model)] == ["head"]
    assert [target.name for target in find_targets(model, "conv*")] == ["conv1", "conv2"]
    only = nn.Sequential(nn.Conv2d(2, 3, 3))
    with pytest.raises(TargetError, match="glob"):
        find_targets(only)
    assert len(find_targets(only, "0")) == 1


def test_a_module_under_two_names_is_one_target() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "other": nn.Linear(4, 4), "again": shared})
    targets = find_targets(model)
    assert [(target.name, target.aliases) for target in targets] == [("first", ("again",)), ("other", ())]
    assert [target.name for target in find_targets(model, "again")] == ["first"]
    albert = AutoModel.from_config(
        AlbertConfig(
            vocab_size=32,
            embedding_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_hidden_groups=1,
        )
    )
    names = [target.name for target in find_targets(albert)]
    assert "pooler" not in names
    assert len(names) == len(set(names)) == 7  # one group, used three times, and the embedding's projection


def test_tied_weights_are_refused_by_name_and_left_out_of_all_linear() -> None:
    for name in ("gemma", "gpt2", "opt", "t5"):
        model = make(name)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert "lm_head" not in {target.name for target in find_targets(model)}
        with pytest.raises(TargetError, match=r"lm_head\n.*weight shared with .*(embed|wte|shared)"):
            find_targets(model, "lm_head")
    twins = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    twins["b"].weight = twins["a"].weight
    assert [target.name for target in find_targets(twins)] == ["c"]
    with pytest.raises(TargetError, match=r"'a' at a\n.*weight shared with b.weight"):
        find_targets(twins, "a")
    with pytest.raises(TargetError, match="weight shared"):
        find_targets(nn.ModuleDict({"a": twins["a"], "b": twins["b"]}))


def test_ties_are_seen_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = make("gemma")
    with pytest.raises(TargetError, match="weight shared"):
        find_targets(model, "lm_head")


def test_layers_that_cannot_be_changed_alone() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "after": nn.Linear(8, 8)})
    assert [target.name for target in find_targets(attention)] == ["after"]
    with pytest.raises(TargetError, match="MultiheadAttention"):
        find_targets(attention, "out_proj")
    parametrized = nn.ModuleDict({"normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    with pytest.raises(TargetError, match="parametrization"):
        find_targets(parametrized)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TargetError, match="uint8"):
        find_targets(nn.Sequential(packed), "0")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("llama", "q_prj", r"found: 15 layers: self_attn.q_proj x2 \(query\).*\n.*rule: .*\n.*fix: .*q_proj"),
        ("llama", "quer", "fix:   query"),
        ("llama", "self_attn", r"fix:   use self_attn\.\*"),
        ("llama", "*.mlp", r"fix:   use \*\.mlp\.\*"),
        ("gpt2", "gate", r"attn.c_proj x2 \(output\)"),
        ("mixtral", "gte", "gate_up_proj"),
        ("llama", "", "no target"),
        ("llama", [], "no target"),
    ],
)
def test_what_matches_nothing_says_what_there_is(name: str, target: str | list[str], message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        find_targets(make(name), target)
    assert caught.value.found
    assert caught.value.rule
    assert caught.value.fix
    assert max(map(len, str(caught.value).splitlines())) < 600


def test_a_label_word_does_not_catch_a_layer_of_that_name() -> None:
    router = nn.ModuleDict({"gate": nn.Linear(4, 2)})
    with pytest.raises(TargetError, match=r"fix:   use \*gate"):
        find_targets(router, "gate")
    assert len(find_targets(router, "*gate")) == 1


def test_a_model_without_linear_layers() -> None:
    for model in (nn.Sequential(nn.ReLU()), nn.Module()):
        with pytest.raises(TargetError, match="no linear layer"):
            find_targets(model)
        with pytest.raises(TargetError, match="no linear layer"):
            find_targets(model, "query")


class OtherExperts(nn.Module):
    """Experts in a three-dimensional parameter, in a form that transformers does not declare."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, 4))


def test_fused_experts_are_named() -> None:
    assert fused_experts(make("mixtral")) == []  # of a known form
    assert fused_experts(make("llama")) == []
    other = nn.ModuleDict({"experts": OtherExperts(), "after": nn.Linear(4, 4)})
    assert fused_experts(other) == ["experts"]
    with pytest.raises(TargetError, match=r"three-dimensional parameters.*experts"):
        find_targets(other, "gate")


def test_exclusions() -> None:
    model = make("llama")
    everything = find_targets(model)
    without = [target for target in everything if "gate" not in target.roles]
    assert find_targets(model, ["all-linear", "!gate"]) == find_targets(model, "all-linear, !*.gate_proj") == without
    assert find_targets(model, "query,value,!layers.0.*") == find_targets(
        model, ["layers.1.*q_proj", "layers.1.*v_proj"]
    )
    assert find_targets(model, ["all-linear", "!model.norm"]) == everything  # a module, though no layer
    with pytest.raises(TargetError, match="target 'vision"):
        find_targets(model, ["all-linear", "!vision*"])
    with pytest.raises(TargetError, match="nothing left"):
        find_targets(model, ["query", "!self_attn.*"])
    with pytest.raises(TargetError, match="no target"):
        find_targets(model, "!query")
    tied = make("gemma")
    assert len(find_targets(tied, ["*", "!lm_head"])) == 7 * LAYERS  # a layer that may not be named may be excluded


@pytest.mark.parametrize(
    ("path", "roles"),
    [
        ("model.layers.0.self_attn.q_a_proj", ("query",)),
        ("model.layers.0.self_attn.q_b_proj", ("query",)),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", ("key", "value")),
        ("model.layers.0.self_attn.kv_b_proj", ("key", "value")),
        ("model.layers.0.feed_forward.w1", ("gate",)),
        ("model.layers.0.feed_forward.w2", ("down",)),
        ("model.layers.0.feed_forward.w3", ("up",)),
        ("model.layers.0.shared_mlp.input_linear", ("gate", "up")),
        ("model.layers.0.shared_mlp.output_linear", ("down",)),
        ("transformer.h.0.mlp.fc_in", ("up",)),
        ("transformer.h.0.mlp.fc_out", ("down",)),
        ("transformer.blocks.0.attn.Wqkv", ("query", "key", "value")),
        ("model.layers.0.temporal_block.linear_out", ("output",)),
        ("backbone.layers.0.mixer.in_proj", ("value", "gate")),
        ("backbone.layers.0.mixer.out_proj", ("output",)),
    ],
)
def test_labels_of_later_families(path: str, roles: tuple[str, ...]) -> None:
    assert roles_of(path) == roles
