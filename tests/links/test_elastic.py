"""Elastic ranks: groups and draws, leading slices, the definition at every rank, merging, extracting, saving."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dovetail
from dovetail.chains.layer.elastic import draw_ranks, extract, groups, ranks, set_ranks, use_reference
from dovetail.chains.layer.linear import ChainLinear, LinkState, chain_layers
from dovetail.checkpoint.adapter import load_adapter, save_adapter
from dovetail.errors import ChainError, LoadError, TrainError
from families import batch, logits, make
from samples import by_definition, chained, closed_chains, input_of, move
from small_models import SUMS, llama, make_tokenizer, parameters, quiet, same, training_killed_at
from tolerance import difference

ELASTIC = [
    "lora(r=5, elastic=[5, 3, 2])",
    "lora(r=6, alpha=7, scaling=rs, elastic=[6, 4, 3, 1])",
    "dora(r=5, alpha=2, elastic=[5, 3])",
    "loha(r=2, alpha=3, elastic=[2, 1])",  # runs as a low rank
    "loha(r=5, alpha=1, elastic=[5, 3, 2])",  # recomputed
    "vera(r=16, elastic=[16, 12, 8])",
]
CHAINS = [
    *ELASTIC,
    "lora(r=5, elastic=[5, 3, 2]) >> dora(r=3, elastic=[3, 1]) >> ia3",
    "lora(r=4, dropout=0.3, elastic=[4, 2])",
    *(
        f"magnitude(0.5) >> int(bits=4, group=8) >> {adapter} >> remask >> {regrid}"
        for adapter, regrid in itertools.product(ELASTIC, ("regrid", "regrid(start=codes)"))
    ),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def all_ranks(model: nn.Module) -> list[dict[str, int]]:
    """Every combination of ranks of a model with few groups."""
    here = groups(model)
    return [
        dict(zip([group.name for group in here], chosen, strict=True))
        for chosen in itertools.product(*(group.ranks for group in here))
    ]


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


# ---- lists


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "vera"])
def test_lists_are_put_in_order_and_bad_ones_refused(method):
    link = dovetail.chain(f"{method}(r=8, elastic=[2, 8, 4])").adapters[0]
    assert link.ranks == (8, 4, 2)
    assert "r=8" in str(link)
    assert str(link).endswith("elastic=[8, 4, 2])")
    assert dovetail.chain(str(link)).links == (link,)
    assert "elastic" not in str(dovetail.chain(f"{method}(r=8, elastic=[])"))
    for bad, rule, fix in [
        ("[4, 2]", "the largest elastic rank must be r", "set r=4 or elastic=\\[8, 4, 2\\]"),
        ("[8, 9]", "from 1 to r=8", "r=9 or elastic=\\[8\\]"),
        ("[8, 0]", "from 1 to r=8", "elastic=\\[8\\]"),
        ("[8, -2]", "from 1 to r=8", "elastic=\\[8\\]"),
        ("[8, 8, 4]", "named once", "elastic=\\[8, 4\\]"),
    ]:
        with pytest.raises(ChainError, match=f"(?s)found: .*{rule}.*fix: .*{fix}"):
            dovetail.chain(f"{method}(r=8, elastic={bad})")
    for bad in ("4", "[1.5]", "[true]", "[four]", "[[8]]"):
        with pytest.raises(ChainError):
            dovetail.chain(f"{method}(r=8, elastic={bad})")
    for bad in ([8, True], [8.0], ["8"], 8, "8"):
        with pytest.raises(ChainError, match="elastic"):
            type(link)(r=8, elastic=bad)
    assert type(link)(r=8, elastic=[4, 8]).ranks == (8, 4)


# ---- groups


def test_what_reads_the_same_input_is_one_group():
    def names(family: str, chain: str = "lora(r=4, elastic=[4, 2])") -> list[str]:
        return [group.name for group in groups(dovetail.apply(make(family), chain))]

    assert names("llama")[:5] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj/0",
        "model.layers.0.self_attn.o_proj/0",
        "model.layers.0.mlp.gate_proj/0",
        "model.layers.0.mlp.up_proj/0",
        "model.layers.0.mlp.down_proj/0",
    ]
    assert names("bert")[0] == "bert.encoder.layer.0.attention.self.query+key+value/0"
    assert names("gpt2")[0] == "transformer.h.0.attn.c_attn/0"
    assert {
        "encoder.block.0.layer.0.SelfAttention.q+k+v/0",
        "decoder.block.0.layer.1.EncDecAttention.q/0",  # it reads the decoder; key and value read the encoder
        "decoder.block.0.layer.1.EncDecAttention.k+v/0",
    } <= set(names("t5"))
    two = names("llama", "lora(r=4, elastic=[4, 2]) >> ia3 >> dora(r=2, elastic=[2, 1])")
    assert two[:2] == [f"model.layers.0.self_attn.q_proj+k_proj+v_proj/{place}" for place in (0, 2)]
    model = dovetail.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "lora(r=4, elastic=[4, 2])")
    assert [group.name for group in groups(model)] == ["0/0", "1/0"]  # no labels: each by itself
    assert groups(dovetail.apply(make("llama"), "lora(r=4)")) == []


def test_reference_is_the_median_and_other_ranks_are_chosen_by_name():
    model = dovetail.apply(make("llama"), "lora(r=9, elastic=[9, 7, 4, 1])")
    assert set(ranks(model).values()) == {4}  # of the two in the middle the lower
    name = next(iter(ranks(model)))
    set_ranks(model, {name: 9})
    assert ranks(model)[name] == 9
    layer = chain_layers(model)["model.layers.0.self_attn.k_proj"]
    assert {key: tuple(t.shape) for key, t in layer.states[0].values().items()} == {"A": (9, 64), "B": (32, 9)}
    for bad in ({name: 5}, {name: 1, "no.such/0": 9}):
        with pytest.raises(ChainError, match="rule"):
            set_ranks(model, bad)
        assert ranks(model)[name] == 9
    use_reference(groups(model))
    assert set(ranks(model).values()) == {4}


def test_a_draw_depends_on_its_seed_alone():
    model = dovetail.apply(make("llama"), "lora(r=9, elastic=[9, 7, 4, 1])")
    drawn = []
    for seed in ("0 step 1", "0 step 2", "0 step 1"):
        draw_ranks(groups(model), seed)
        drawn.append(ranks(model))
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
    assert len(set(drawn[0].values())) > 1
    counts = dict.fromkeys((9, 7, 4, 1), 0)
    for step in range(200):
        draw_ranks(groups(model), f"0 step {step}")
        for rank in ranks(model).values():
            counts[rank] += 1
    assert all(count == pytest.approx(500, rel=0.15) for count in counts.values())


# ---- sub-adapters


@pytest.mark.parametrize("text", CHAINS)
def test_the_fast_path_is_the_definition_at_every_rank(text):
    model, x = chained(text, dtype=torch.float64), input_of(dtype=torch.float64)
    path = model.layer.path
    seen = []
    for chosen in all_ranks(model):
        set_ranks(model, chosen)
        torch.testing.assert_close(model(x), by_definition(model.layer, x), rtol=1e-10, atol=1e-10)
        seen.append(outputs(model, x))
    assert model.layer.path == path
    assert any(not torch.equal(seen[0], other) for other in seen[1:])
    set_ranks(model, all_ranks(model)[0])  # the largest: what the plain link of rank r does
    if "elastic" in text:
        plain = chained("".join(_without_elastic(text)), dtype=torch.float64)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(outputs(plain, x), outputs(model, x))


def _without_elastic(text: str) -> str:
    start = text.find(", elastic=[")
    return text if start < 0 else _without_elastic(text[:start] + text[text.index("]", start) + 1 :])


def test_the_scale_stays_that_of_the_full_rank():
    for text, scale in [("lora(r=6, alpha=3, elastic=[6, 2])", 0.5), ("loha(r=6, alpha=3, elastic=[6, 2])", 0.5),
                        ("dora(r=6, alpha=3, elastic=[6, 2])", 0.5),
                        ("lora(r=6, alpha=3, scaling=rs, elastic=[6, 2])", 3 / math.sqrt(6))]:  # fmt: skip
        link = dovetail.chain(text).adapters[0]
        small = link.plain(2)
        assert small.ranks == ()
        assert small.scale == pytest.approx(scale, rel=1e-15)
        assert small.alpha == pytest.approx(scale * (math.sqrt(2) if "rs" in text else 2))


@pytest.mark.parametrize("text", ELASTIC)
def test_only_leading_slices_get_gradients(text):
    for closing in ("", " >> remask"):
        model, x = chained(f"magnitude(0.5) >> {text}{closing}"), input_of()
        state = model.layer.states[0]
        for chosen in all_ranks(model):
            set_ranks(model, chosen)
            model.zero_grad()
            model(x).square().sum().backward()
            for name, parameter in state.named_parameters():
                axis = state.link.rank_axes.get(name)
                if axis is None:
                    assert int((parameter.grad == 0).sum()) <= 1, name  # the layer has a row of zeros
                    continue
                used = parameter.grad.transpose(0, axis)[: state.rank]
                unused = parameter.grad.transpose(0, axis)[state.rank :]
                assert float(used.abs().max()) > 0, name
                assert float(unused.abs().sum()) == 0, name


@pytest.mark.parametrize("text", [text for text in closed_chains() if "elastic" in text])
def test_closed_chains_merge_bit_for_bit_at_every_rank(text):
    for dtype, place in itertools.product(DTYPES, range(3)):
        model, x = chained(text, dtype=dtype), input_of(dtype=dtype)
        chosen = all_ranks(model)
        set_ranks(model, chosen[place % len(chosen)])
        before, sparsity = model(x), float((model.layer.frozen_weight()[0] == 0).float().mean())
        report = dovetail.merge(model, probe={"x": x})
        assert report.exact
        assert report.off_grid == 0
        assert torch.equal(model(x), before)
        assert report.sparsity_after == pytest.approx(sparsity)


@torch.no_grad()  # torch multiplies batches another way where something takes a gradient, and merging changes what does
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "t5", "bert"])
def test_every_family_merges_bit_for_bit_at_drawn_ranks_extracted_or_not(family):
    for text in ("lora(r=6, elastic=[6, 4, 2])", "vera(r=8, elastic=[8, 4]) >> lora(r=4, elastic=[4, 2])"):
        found = []
        for extracted in (False, True):
            model = make(family)
            inputs = batch(model)
            dovetail.apply(model, f"magnitude(0.5) >> int(bits=4, group=32) >> {text} >> remask >> regrid")
            move(model, 0.02)
            draw_ranks(groups(model), f"some for {family}")
            assert len(set(ranks(model).values())) > 1
            before = logits(model, inputs)
            if extracted:
                extract(model)
                assert torch.equal(logits(model, inputs), before)
            report = dovetail.merge(model)
            assert report.exact
            assert report.off_grid == 0
            assert report.sparsity_after == report.sparsity_before >= 0.5
            assert torch.equal(logits(model, inputs), before)
            found.append(before)
        assert torch.equal(*found)


# ---- extracting


@pytest.mark.parametrize("text", CHAINS)
def test_extracting_changes_no_bit(text):
    for dtype in DTYPES:
        model, x = chained(text, dtype=dtype), input_of(dtype=dtype)
        for chosen in all_ranks(model):
            model = chained(text, dtype=dtype)
            set_ranks(model, chosen)
            layer: ChainLinear = model.layer
            weight, used, before = layer.effective_weight()[0], layer.frozen_weight()[0], outputs(model, x)
            assert extract(model) is model
            assert torch.equal(layer.effective_weight()[0], weight)
            assert torch.equal(layer.frozen_weight()[0], used)
            assert torch.equal(outputs(model, x), before)
            for name, rank in chosen.items():
                state = layer.states[int(name[-1])]
                assert state.rank is None
                assert state.link.ranks == ()
                assert state.link.r == rank
                shapes = {name: tuple(p.shape) for name, p in state.named_parameters()}
                assert shapes == state.link.parameter_shapes(state.site)
                assert all(p.requires_grad for p in state.parameters())
            assert groups(model) == []
            with pytest.raises(ChainError, match="no elastic adapter"):
                extract(model)


def test_an_extracted_adapter_weighs_and_trains_less():
    model = dovetail.apply(make("llama"), "lora(r=8, elastic=[8, 4, 2]) >> ia3")
    before = dovetail.footprint(model)
    move(model, 0.01)
    extract(model)
    after = dovetail.footprint(model)
    plain = dovetail.footprint(dovetail.apply(make("llama"), "lora(r=4) >> ia3"))
    assert after.trainable_parameters == plain.trainable_parameters < before.trainable_parameters
    assert after.nbytes == plain.nbytes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_extracted_ranks_are_peft_s_rank_pattern():
    import peft

    model, base = make("llama").double(), make("llama").double()
    dovetail.apply(model, "lora(r=8, alpha=5, elastic=[8, 4, 3])")
    move(model, 0.05)
    draw_ranks(groups(model), "some")
    inputs = batch(model)
    wanted = logits(model, inputs)
    extract(model)
    links = {name: layer.states[0].link for name, layer in chain_layers(model).items()}
    assert len({link.r for link in links.values()}) == 3
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            target_modules=list(links),
            rank_pattern={name: link.r for name, link in links.items()},
            alpha_pattern={name: link.alpha for name, link in links.items()},
        ),
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        for name, layer in chain_layers(model).items():
            target = theirs.base_model.model.get_submodule(name)
            target.lora_A["default"].weight.copy_(layer.states[0].A)
            target.lora_B["default"].weight.copy_(layer.states[0].B)
    # The norms of a model in float64 still round to float32.
    assert difference(logits(theirs, inputs), wanted) <= torch.finfo(torch.float32).eps


# ---- training


class Draws:
    """Notes the ranks at which every forward pass of a layer runs."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int | None, bool]] = []
        state = chain_layers(model)["model.layers.0.self_attn.q_proj"].states[0]
        values = LinkState.terms

        def noted(this: LinkState, **how: bool) -> object:
            if this is state:
                self.seen.append((this.rank, this.training))
            return values(this, **how)

        monkeypatch.setattr(LinkState, "terms", noted)

    def training(self) -> list[int | None]:
        return [rank for rank, training in self.seen if training]


TEXT = "lora(r=6, dropout=0.1, elastic=[6, 4, 2, 1]) >> ia3"


def test_one_draw_a_step_in_all_batches_and_in_what_is_computed_again(monkeypatch):
    found = []
    for accumulated, checkpointing in ((1, False), (3, False), (1, True), (3, True)):
        model = dovetail.apply(llama(), TEXT)
        with monkeypatch.context() as patch:
            draws = Draws(model, patch)
            quiet(
                model, SUMS, max_steps=6, batch_size=8, gradient_accumulation=accumulated,
                gradient_checkpointing=checkpointing,
            )  # fmt: skip
        each = accumulated * (2 if checkpointing else 1)
        seen = draws.training()
        assert len(seen) == 6 * each
        steps = [seen[at : at + each] for at in range(0, len(seen), each)]
        assert all(len(set(step)) == 1 for step in steps)
        found.append(([step[0] for step in steps], parameters(model)))
        assert set(ranks(model).values()) == {2}
    assert all(drawn == found[0][0] for drawn, _ in found)
    assert len(set(found[0][0])) > 1
    assert same(found[0][1], found[2][1])
    assert same(found[1][1], found[3][1])


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    chain = "lora(r=4, elastic=[4, 2, 1]) >> magnitude(0.3) >> loha(r=3, elastic=[3, 2, 1]) >> remask"
    settings = {"max_steps": 10, "checkpoint_every": 4, "evaluate_every": 5}
    whole = dovetail.apply(llama(), chain)
    expected = quiet(whole, SUMS, **settings)
    with training_killed_at(17):
        quiet(dovetail.apply(llama(), chain), SUMS, output_dir=tmp_path / "run", **settings)
    model = dovetail.apply(llama(), chain)
    report = quiet(model, SUMS, output_dir=tmp_path / "run", resume=True, **settings)
    assert same(parameters(model), parameters(whole))
    for ours, theirs in zip(report.stages, expected.stages, strict=True):
        assert (ours.losses, ours.evaluations) == (theirs.losses, theirs.evaluations)


def test_validation_sees_the_reference_ranks_and_so_does_what_follows_an_error(monkeypatch):
    model = dovetail.apply(llama(), TEXT)
    draws = Draws(model, monkeypatch)
    report = quiet(model, SUMS, max_steps=4, evaluate_every=2, evaluate_limit=4)
    assert len(report.stages[0].evaluations) == 2
    started = [training for _, training in draws.seen].index(True)  # the passes before try the first batch
    assert {rank for rank, training in draws.seen[started:] if not training} == {2}
    assert set(draws.training()) != {2}
    model = dovetail.apply(llama(), TEXT)
    with pytest.raises(TrainError, match="must be finite"):
        quiet(model, SUMS, max_steps=30, lr_scale=1e30)
    assert set(ranks(model).values()) == {2}


def test_every_sub_adapter_learns():
    model = dovetail.apply(llama(), "lora(r=8, elastic=[8, 4, 2])")
    x = batch_of_sums(model)

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(**x).loss)

    start = loss()
    quiet(model, SUMS, max_steps=60, lr_scale=10)
    for rank in (8, 4, 2):
        set_ranks(model, dict.fromkeys(ranks(model), rank))
        assert loss() < 0.8 * start, rank


def batch_of_sums(model: nn.Module) -> dict[str, Tensor]:
    from dovetail.tasks.tokens import Collator, encode

    rows = encode("generation", SUMS.split("train")[:16], make_tokenizer(), encoder_decoder=False, max_length=64)
    return Collator(0)(rows)


def test_a_chain_that_is_not_elastic_draws_nothing(monkeypatch):
    monkeypatch.setattr("dovetail.training.callbacks.draw_ranks", None)
    quiet(dovetail.apply(llama(), "lora(r=4)"), SUMS, max_steps=2)


# ---- save and load


SAVED = [
    "lora(r=5, alpha=7, elastic=[5, 3, 2]) >> vera(r=16, elastic=[16, 12, 8])",
    "wanda(0.5) >> int(bits=4, group=32) >> loha(r=5, elastic=[5, 2]) >> remask >> regrid",
]


@pytest.mark.parametrize("text", SAVED)
@pytest.mark.parametrize("extracted", [False, True])
def test_ranks_and_the_extracted_form_travel_along(text, extracted, tmp_path):
    model = make("llama").eval()
    inputs = batch(model)
    dovetail.apply(model, text, calibration=[inputs])
    move(model, 0.02)
    draw_ranks(groups(model), "some")
    before = logits(model, inputs)
    if extracted:
        extract(model)
    save_adapter(model, tmp_path)
    again = load_adapter(make("llama").eval(), tmp_path)
    carries = dovetail.apply(make("llama").eval(), text, calibration=[inputs])
    for loaded in (again, load_adapter(carries, tmp_path), load_adapter(again, tmp_path)):
        assert torch.equal(logits(loaded, inputs), before)
        assert ranks(loaded) == ranks(model)
        assert [str(s.link) for layer in chain_layers(loaded).values() for s in layer.states] == [
            str(s.link) for layer in chain_layers(model).values() for s in layer.states
        ]
    save_adapter(again, tmp_path / "again")
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def first_rank(header: dict) -> str:
    return next(iter(header["ranks"]))


LIES = {
    "a rank outside the list": lambda h, t: h["ranks"].update({first_rank(h): 7}),
    "a negative rank": lambda h, t: h["ranks"].update({first_rank(h): -1}),
    "a rank of nothing": lambda h, t: h["ranks"].update({"lm_head/0": 4}),
    "a missing rank": lambda h, t: h["ranks"].pop(first_rank(h)),
    "no ranks": lambda h, t: h.pop("ranks"),
    "a text for a rank": lambda h, t: h["ranks"].update({first_rank(h): "many"}),
    "ranks that are no mapping": lambda h, t: h.update(ranks=[4]),
    "extracted, said of one that isn't": lambda h, t: h.update(extracted=True),
    "a tensor of another rank": lambda h, t: t.update({next(iter(t)): torch.zeros(3, 3)}),
}


@pytest.mark.filterwarnings("ignore:.*no digest")
@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_and_the_model_is_as_it_was(lie, tmp_path):
    model = dovetail.apply(make("llama"), "lora(r=8, elastic=[8, 4, 2])")
    save_adapter(model, tmp_path)
    header, tensors = json.loads((tmp_path / "adapter.json").read_text()), load_file(tmp_path / "adapter.safetensors")
    LIES[lie](header, tensors)
    del header["digest"]  # as in adapters of earlier versions: the file lies, but it is not damaged
    (tmp_path / "adapter.json").write_text(json.dumps(header))
    save_file(tensors, tmp_path / "adapter.safetensors")
    fresh, carries = make("llama"), dovetail.apply(make("llama"), "lora(r=8, elastic=[8, 4, 2])", seed=1)
    before = parameters(carries)
    for target in (fresh, carries):
        with pytest.raises(LoadError):
            load_adapter(target, tmp_path)
    assert not chain_layers(fresh)
    assert same(parameters(carries), before)
    assert set(ranks(carries).values()) == {4}


def test_an_elastic_file_is_not_put_on_an_extracted_model(tmp_path):
    text = "lora(r=8, elastic=[8, 4, 2])"
    model = dovetail.apply(make("llama"), text)
    save_adapter(model, tmp_path / "elastic")
    with pytest.raises(LoadError, match="is extracted as"):
        load_adapter(extract(dovetail.apply(make("llama"), text)), tmp_path / "elastic")
    set_ranks(model, dict.fromkeys(ranks(model), 8))
    save_adapter(extract(model), tmp_path / "extracted")
    with pytest.raises(LoadError, match="is extracted as"):
        load_adapter(extract(dovetail.apply(make("llama"), text)), tmp_path / "extracted")
