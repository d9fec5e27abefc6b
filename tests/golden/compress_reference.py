"""Makes compress.json: what llm-compressor's own GPTQ, Wanda and SparseGPT make of small layers.

Its functions are called as its modifiers call them: a Hessian accumulated sequence by sequence, scales and zero points
from its own weight observer, damping 0.01, blocks of 128. Weights and inputs are made again from a seed (`layer`),
which test_compress_golden.py imports too; stored are errors ‖XWᵀ - XŴᵀ‖ and masks, as packed bits.

llm-compressor brings its own transformers, so it needs a virtual environment of its own:
    python -m venv PEER && PEER/bin/pip install llmcompressor==0.14.0.1 torch==2.13.0
    PEER/bin/python tests/golden/compress_reference.py
"""

from __future__ import annotations

import base64
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = ((256, 128), (192, 256), (128, 384))
SEQUENCES, TOKENS = 8, 250


def layer(seed: int, o: int, i: int) -> tuple[Tensor, Tensor]:
    """A weight (o, i) and inputs (SEQUENCES, TOKENS, i) as transformers have: uneven, correlated, some outliers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight_oi = 0.03 * normal(o, i) * (0.3 * normal(i)).exp()
    weight_oi[:, :: i // 4] *= 3
    scale_i = (0.7 * normal(i)).exp()
    scale_i[i // 8 :: i // 3] *= 6  # none at the end, where which way it is rounded by chance decides the error
    mix_ii = torch.eye(i, dtype=torch.float64) + normal(i, i // 8) @ normal(i // 8, i) / i**0.5
    x = (normal(SEQUENCES, TOKENS, i) @ mix_ii + 0.3 * normal(i)) * scale_i
    return weight_oi.float(), x.float()


def error(weight_oi: Tensor, new_oi: Tensor, x: Tensor) -> float:
    """‖XWᵀ - XŴᵀ‖ (Frobenius), in float64."""
    return float((x.double().flatten(0, 1) @ (weight_oi.double() - new_oi.double()).t()).norm())


def pack_mask(mask: Tensor) -> str:
    """(o, i) bool as bits, base64."""
    bits = mask.flatten().view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    return base64.b64encode(bytes(bits.sum(1).tolist())).decode()


def unpack_mask(text: str, shape: tuple[int, int]) -> Tensor:
    """What `pack_mask` packed."""
    packed = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).view(shape).bool()


def gptq(weight_oi: Tensor, x: Tensor, bits: int, group: int, symmetric: bool, act_order: bool) -> Tensor:
    """Ŵ (o, i) of llm-compressor's GPTQ."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq import gptq_quantize, helpers
    from llmcompressor.observers import Observer

    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group else "channel",
        group_size=group or None,
        actorder="static" if act_order else None,
    )
    module = linear(weight_oi)
    hessian, count = helpers.make_empty_hessian(module), torch.zeros(())
    for sequence in x:
        hessian, count = helpers.accumulate_hessian(sequence[None], module, hessian, count)
    observer = Observer.load_from_registry(
        arguments.observer or "memoryless_minmax", base_name="weight", args=arguments
    )
    found = observer(weight_oi).get_qparams()
    new, _, fell_back = gptq_quantize.quantize_weight(
        weights=weight_oi[None].clone(),
        hessians=(hessian / count)[None],
        scale=found["scale"][None],
        zero_point=found["zero_point"][None],
        global_scale=None,
        quant_args=arguments,
    )
    assert not bool(fell_back)
    return new[0]


def wanda(weight_oi: Tensor, x: Tensor, sparsity: float, pattern: str | None) -> Tensor:
    """The pruned weight of llm-compressor's Wanda."""
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    module = linear(weight_oi)
    scalars, count = wanda_sparsify.make_empty_row_scalars(module), 0
    for sequence in x:
        scalars, count = wanda_sparsify.accumulate_row_scalars(sequence[None], module, scalars, count)
    n, m = pruned(pattern)
    return wanda_sparsify.sparsify_weight(module, {module: scalars}, sparsity, n, m)


def sparsegpt(weight_oi: Tensor, x: Tensor, sparsity: float, pattern: str | None) -> Tensor:
    """The pruned weight of llm-compressor's SparseGPT."""
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify

    module = linear(weight_oi)
    hessian, count = sgpt_sparsify.make_empty_hessian(module), 0
    for sequence in x:
        hessian, count = sgpt_sparsify.accumulate_hessian(sequence[None], module, hessian, count)
    n, m = pruned(pattern)
    return sgpt_sparsify.sparsify_weight(module, {module: hessian}, sparsity, n, m, 128, 0.01, False)[1]


def linear(weight_oi: Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(weight_oi.shape[1], weight_oi.shape[0], bias=False).requires_grad_(False)
    module.weight.copy_(weight_oi)
    return module


def pruned(pattern: str | None) -> tuple[int, int]:
    """How many go of how many, which is how llm-compressor reads N:M; Dovetail tells how many stay."""
    if pattern is None:
        return 0, 0
    n, m = map(int, pattern.split(":"))
    return m - n, m


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = []
    for seed, (o, i) in enumerate(SHAPES):
        weight, x = layer(seed, o, i)
        where = {"seed": seed, "shape": [o, i]}
        for bits, group, symmetric, act_order in product((2, 3, 4, 8), (32, 128, 0), (False, True), (False, True)):
            arguments = {"bits": bits, "group": group, "symmetric": symmetric, "act_order": act_order}
            new = gptq(weight, x, **arguments)
            cases.append({"method": "gptq", **where, "arguments": arguments, "error": error(weight, new, x)})
        for method in (wanda, sparsegpt):
            for sparsity, pattern in ((0.5, None), (0.7, None), (0.5, "2:4"), (0.75, "2:8")):
                new = method(weight, x, sparsity, pattern)
                case = {"method": method.__name__, **where, "arguments": {"sparsity": sparsity, "pattern": pattern}}
                cases.append(case | {"error": error(weight, new, x), "zeros": pack_mask(new == 0)})
    path = Path(__file__).with_name("compress.json")
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
