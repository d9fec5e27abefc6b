"""The walk beside a naive one: the whole model run anew for every block, with hooks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import XLMConfig, XLMWithLMHeadModel

import dovetail
from dovetail.chains.layer.applied import Inputs
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.chains.statistics import InputStatistics
from dovetail.compression.blocks import blocks_of, calibrate_blocks
from dovetail.compression.passes import split
from dovetail.errors import ChainError, DataError
from dovetail.models.experts import Experts, one_by_one
from families import FAMILIES, batch, make
from tolerance import rounding

Batches = Sequence[dict[str, Tensor]]


def coarser(layer: ChainLinear) -> None:
    """A change of the weight that shows in the blocks behind, and rounds no other way where an input differs a bit."""
    layer.base.set_dense((layer.base.matrix() * 40).round() / 40)


def covered(model: nn.Module) -> dict[str, ChainLinear]:
    """The model's layers as the walk finds them: under a chain, nothing done yet."""
    return chain_layers(dovetail.apply(model, "magnitude(0.0)"))


@torch.no_grad()
def seen_by(model: nn.Module, names: Sequence[str], batches: Batches) -> dict[str, list[Tensor]]:
    """Rows that each layer is fed in a run of the whole model, padding left out, float64."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    mask: Tensor | None = None

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if mask is not None and x.shape[:2] == mask.shape and x.dim() == 3:
                x = x[mask.bool()]
            elif mask is not None and x.dim() == 2 and len(x) == mask.numel():  # OPT's feed-forward
                x = x[mask.flatten().bool()]
            rows[name].append(x.reshape(-1, x.shape[-1]).double())

        return hook

    def to_no_expert(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index, weights = args
        return hidden, index.masked_fill(mask.flatten()[:, None] == 0, module.num_experts), weights

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n), with_kwargs=True) for n in names]
    handles += [m.register_forward_pre_hook(to_no_expert) for m in model.modules() if isinstance(m, Experts)]
    for inputs in batches:
        mask = inputs.get("attention_mask")
        with one_by_one(model):  # where a token may be routed to no expert
            model(**inputs)
    for handle in handles:
        handle.remove()
    return rows


def naive(model: nn.Module, batches: Batches, inputs: Inputs) -> dict[str, Tensor]:
    """Gram matrix of each layer, with the blocks before it compressed or as they were."""
    layers = covered(model)
    original = copy.deepcopy(model)
    grams = {}
    for names in blocks_of(model, list(layers)).values():
        for name, rows in seen_by(model if inputs == "compressed" else original, names, batches).items():
            grams[name] = torch.cat(rows).t() @ torch.cat(rows)
        for name in names:
            coarser(layers[name])
    return grams


def walked(model: nn.Module, batches: Batches, inputs: Inputs, *, gram: bool = True) -> dict[str, InputStatistics]:
    layers = covered(model)
    found: dict[str, InputStatistics] = {}

    def compress(statistics: dict[str, InputStatistics]) -> None:
        found.update(statistics)
        for name in statistics:
            coarser(layers[name])

    calibrate_blocks(model, layers, batches, compress, wanted={"gram"} if gram else {"norm"}, inputs=inputs)
    return found


def assert_same(found: dict[str, InputStatistics], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    bound = rounding(torch.float32, 128, steps=8)  # the products of a block one after the other, then the Gram's
    for name, gram in wanted.items():
        size = float(gram.diagonal().max())
        got = found[name].gram_ii
        if got is not None:
            torch.testing.assert_close(
                got.double(), gram, rtol=bound, atol=bound * size, msg=lambda m, n=name: f"{n}: {m}"
            )
        torch.testing.assert_close(found[name].square_i.double(), gram.diagonal(), rtol=bound, atol=bound * size)


def clean(model: nn.Module, threads: int) -> None:
    """No thread is left, no forward replaced, no hook, and the mode is as it was."""
    assert threading.active_count() == threads
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("inputs", ["compressed", "original"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_a_naive_walk_on_every_family(name: str, inputs: Inputs) -> None:
    batches = [batch(FAMILIES[name](), rows=rows, tokens=24, seed=rows) for rows in (6, 4, 5)]
    if name.startswith("t5"):
        batches = [b | {"decoder_attention_mask": torch.ones_like(b["decoder_input_ids"])} for b in batches]
    model = FAMILIES[name]()
    model.train()
    threads = threading.active_count()
    found = walked(model, batches, inputs)
    assert_same(found, naive(FAMILIES[name](), batches, inputs))
    assert model.training
    clean(model, threads)


def test_a_model_that_caches_whatever_its_config_says() -> None:
    def xlm() -> Any:
        torch.manual_seed(0)
        config = XLMConfig(
            vocab_size=128, emb_dim=32, n_layers=2, n_heads=2, max_position_embeddings=64, pad_index=0, pad_token_id=0
        )
        return XLMWithLMHeadModel(config).eval()

    ids = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    # Its attentions and its feed-forward layers stand in two lists, so only the original inputs have one order.
    assert_same(walked(xlm(), batches, "original"), naive(xlm(), batches, "original"))


def test_without_gram_matrices() -> None:
    model = FAMILIES["llama"]()
    batches = [batch(model, rows=4, tokens=16, seed=seed) for seed in range(2)]
    found = walked(model, batches, "compressed", gram=False)
    assert all(statistics.gram_ii is None for statistics in found.values())
    assert_same(found, naive(FAMILIES["llama"](), batches, "compressed"))


def test_query_key_and_value_share_one_object() -> None:
    model = FAMILIES["llama"]()
    found = walked(model, [batch(model, rows=4, tokens=16)], "compressed")
    by_name = {name.rsplit(".", 1)[1]: found[name] for name in found if ".0." in name}
    assert by_name["q_proj"] is by_name["k_proj"] is by_name["v_proj"]
    assert by_name["gate_proj"] is by_name["up_proj"]
    assert len({id(statistics) for statistics in by_name.values()}) == 4


def test_large_batches_are_cut() -> None:
    model = FAMILIES["gpt2"]()
    large = batch(model, rows=40, tokens=64)
    parts = [{k: v[at : at + 8] for k, v in large.items()} for at in range(0, 40, 8)]
    assert_same(walked(model, [large], "compressed"), naive(FAMILIES["gpt2"](), parts, "compressed"))


class Block(nn.Module):
    """Two layers; `again` calls the second twice, `apart` gives it another tensor in some batches only."""

    def __init__(self, *, again: bool = False, apart: bool = False) -> None:
        super().__init__()
        self.a_proj, self.b_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again, self.apart = again, apart

    def forward(self, x: Tensor, hurt: Tensor) -> Tensor:
        y = self.a_proj(x)
        y = y + self.b_proj(2 * x if self.apart and float(x[0, 0, 0]) > 0 else x)
        return x + torch.tanh(self.b_proj(y) if self.again else y)


class Trouble(Block):
    """Does what `hurt` says: 1 makes its input infinite, 2 raises, 3 is Ctrl-C."""

    def forward(self, x: Tensor, hurt: Tensor) -> Tensor:
        kind = int(hurt)
        if kind == 2:
            raise RuntimeError("of the block")
        if kind == 3:
            raise KeyboardInterrupt
        return super().forward(x * torch.inf if kind == 1 else x, hurt)


class Net(nn.Module):
    """Blocks in a list, with a layer before and a layer behind them that are in none."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.in_proj = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(blocks)
        self.out_proj = nn.Linear(16, 4)

    def forward(self, x: Tensor, hurt: Tensor) -> Tensor:
        x = self.in_proj(x)
        for block in self.blocks:
            x = block(x, hurt)
        return self.out_proj(x)


def net(*kinds: Callable[[], nn.Module], shared: bool = False) -> Net:
    torch.manual_seed(0)
    blocks = [kind() for kind in kinds]
    return Net(*blocks, *([blocks[0]] if shared else []))


def data(*hurt: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(4, 8, 8, generator=generator), "hurt": torch.tensor(kind)} for kind in hurt]


@pytest.mark.parametrize("inputs", ["compressed", "original"])
def test_layers_outside_of_blocks_are_blocks(inputs: Inputs) -> None:
    found = walked(net(Block, Block), data(0, 0, 0), inputs)
    assert set(found) >= {"in_proj", "out_proj"}
    assert_same(found, naive(net(Block, Block), data(0, 0, 0), inputs))


@pytest.mark.parametrize("inputs", ["compressed", "original"])
def test_a_layer_that_is_called_twice_in_its_block_counts_twice(inputs: Inputs) -> None:
    def again() -> Block:
        return Block(again=True)

    found = walked(net(again, again), data(0, 0, 0), inputs)
    assert_same(found, naive(net(again, again), data(0, 0, 0), inputs))
    assert found["blocks.0.b_proj"].tokens == 2 * found["blocks.0.a_proj"].tokens


def test_inputs_that_are_shared_in_some_batches_only_are_counted_apart() -> None:
    def apart() -> Block:
        return Block(apart=True)

    batches = data(0, 0, 0, 0, 0, 0)
    found = walked(net(apart, apart), batches, "compressed")
    assert found["blocks.0.a_proj"] is not found["blocks.0.b_proj"]
    assert_same(found, naive(net(apart, apart), batches, "compressed"))


def test_a_block_that_is_used_again_is_compressed_on_its_first_use() -> None:
    model = net(Block, Block, shared=True)
    found = walked(model, data(0, 0), "compressed")
    once = naive(net(Block, Block), data(0, 0), "compressed")
    once.pop("out_proj")  # behind the second use
    assert_same({name: found[name] for name in once}, once)
    assert len(found) == len(once) + 1


def test_values_that_are_not_finite_are_named_while_the_model_is_untouched() -> None:
    model = net(Block, Trouble)
    threads, before = threading.active_count(), copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=r"blocks\.1\.\w_proj"):
        dovetail.apply(model, "wanda(0.5)", calibration=data(1))
    assert not chain_layers(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    clean(model, threads)


@pytest.mark.parametrize(
    ("hurt", "error"), [(1, DataError), (2, RuntimeError), (3, KeyboardInterrupt)], ids=["inf", "raise", "ctrl-c"]
)
@pytest.mark.parametrize("chain", ["wanda(0.5)", "gptq(bits=4, group=8)"])
def test_a_later_batch_that_fails_leaves_a_model_that_refuses_use(
    chain: str, hurt: int, error: type[BaseException]
) -> None:
    model = net(Block, Trouble, Block)
    threads = threading.active_count()
    with pytest.raises(error):
        dovetail.apply(model, chain, calibration=data(0, hurt))
    clean(model, threads)
    with pytest.raises(ChainError, match="compression was interrupted"):
        dovetail.merge(model)


class Outside(Net):
    """Fails between its blocks, in the pass's own thread."""

    def forward(self, x: Tensor, hurt: Tensor) -> Tensor:
        x = self.blocks[0](self.in_proj(x), hurt)
        if int(hurt) == 2:
            raise RuntimeError("of the model")
        return self.out_proj(self.blocks[1](x, hurt))


def test_a_model_that_fails_between_blocks() -> None:
    model = Outside(Block(), Block())
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="of the model"):
        dovetail.apply(model, "wanda(0.5)", calibration=data(0, 2))
    clean(model, threads)


def test_a_layer_that_nothing_reaches_is_named() -> None:
    model = net(Block)
    model.spare_proj = nn.Linear(4, 4)
    with pytest.raises(DataError, match="spare_proj"):
        dovetail.apply(model, "wanda(0.5)", calibration=data(0))
    assert not chain_layers(model)


def test_too_few_tokens_for_a_gram_matrix() -> None:
    model = net(Block)
    with pytest.raises(DataError, match="tokens"):
        dovetail.apply(
            model, "gptq(bits=4, group=8)", calibration=[{"x": torch.randn(1, 3, 8), "hurt": torch.tensor(0)}]
        )


def test_the_decoders_padding_is_left_out_too() -> None:
    model = make("t5").eval()
    ids = torch.arange(12).view(2, 6) + 3
    some = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    fewer = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])  # the same shape: only the key tells them apart
    inputs = {
        "input_ids": ids, "attention_mask": some, "decoder_input_ids": ids, "decoder_attention_mask": fewer,
    }  # fmt: skip
    tokens = {name: found.tokens for name, found in walked(model, [inputs], "compressed", gram=False).items()}
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == 9
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == 5
    assert tokens["decoder.block.0.layer.1.EncDecAttention.q"] == 5
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == 9
    assert tokens["decoder.block.1.layer.2.DenseReluDense.wo"] == 5


class Borrows(nn.Module):
    """Its blocks call a layer that lies beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.wrapped = nn.ModuleList([Calls(self.blocks[0], [self.shared]), Calls(self.blocks[1], [])])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.wrapped:
            x = block(x)
        return x


class Calls(nn.Module):
    def __init__(self, own: nn.Module, others: Sequence[nn.Module]) -> None:
        super().__init__()
        self.own = own
        self.others: Sequence[nn.Module] = others  # not its children

    def forward(self, x: Tensor) -> Tensor:
        for other in self.others:
            x = other(x)
        return self.own(x)


def test_a_layer_that_a_block_borrows_is_calibrated_there() -> None:
    model = Borrows()
    x = torch.randn(20, 8)
    layers = covered(model)
    for calls in model.wrapped:
        assert isinstance(calls, Calls)
        calls.others = [layers["shared"]] if calls.others else []
    found: dict[str, InputStatistics] = {}
    calibrate_blocks(model, layers, [{"x": x}], found.update, wanted={"gram"})
    assert {name: one.tokens for name, one in found.items()} == dict.fromkeys(layers, 20)


def test_small_batches_go_together() -> None:
    model = make("llama")
    pieces = split(model, [batch(model, rows=1, tokens=100, seed=s) for s in range(25)])
    assert [len(piece["input_ids"]) for piece in pieces] == [10, 10, 5]


def test_works_under_a_callers_inference_mode() -> None:
    model = make("llama").eval()
    with torch.inference_mode():
        inputs = batch(model)
        dovetail.apply(model, "wanda(0.5) >> gptq(bits=4, group=32) >> lora(r=4)", calibration=[inputs])
    with torch.enable_grad():
        model(**batch(model)).logits.sum().backward()
