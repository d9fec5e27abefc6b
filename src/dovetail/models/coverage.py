"""What a chain leaves out: the parameters of a model outside of it, counted by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from dovetail.models.targets import fused_experts, heads, inside, is_linear

_TOWERS = (
    ("vision tower", re.compile(r"vision\w*|visual\w*|image_\w+|vit|multi_modal_projector|patch_embed\w*")),
    ("audio tower", re.compile(r"audio\w*|speech\w*")),
)
_ROUTER = re.compile(r"gate|router|\w*_router|shared_expert_gate")


def left_out(model: nn.Module, covered: Collection[int]) -> dict[str, int]:
    """Count the parameters outside a chain: kind -> numbers, shared ones once, the largest kind first.

    The kinds are embeddings, experts (of a mixture), router, vision tower, audio tower, norms, head, linear layers,
    convolutions, biases, other. A head that is tied to the embeddings counts as embeddings.

    covered  the `id` of each parameter that is not counted
    """
    head_paths, expert_paths, seen = heads(model), fused_experts(model), set(covered)
    found: Counter[str] = Counter()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[_kind(path, module, name, parameter, head_paths, expert_paths)] += parameter.numel()
    return dict(found.most_common())


def described(covered_fraction: float, left: Mapping[str, int]) -> str:
    """Return the coverage in words.

    >>> described(0.4, {"embeddings": 500, "norms": 100})
    '40 % of the parameters are under the chain; left out: embeddings 50 %, norms 10 %'
    """
    total = sum(left.values()) / (1 - covered_fraction) if covered_fraction < 1 else 1
    parts = ", ".join(f"{kind} {_percent(count / total)}" for kind, count in left.items())
    return f"{_percent(covered_fraction)} of the parameters are under the chain; left out: {parts or 'nothing'}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share == 0 or share >= 1e-4 else "less than 0.01 %"


def _kind(
    path: str, module: nn.Module, name: str, parameter: Tensor, head_paths: list[str], expert_paths: list[str]
) -> str:
    parts = path.split(".")
    tower = next((kind for kind, pattern in _TOWERS if any(map(pattern.fullmatch, parts))), "")
    if tower:
        return tower
    if inside(path, head_paths):
        return "head"
    if isinstance(module, nn.Embedding) or "embed" in f"{parts[-1]}.{name}".lower():
        return "embeddings"
    if "norm" in f"{type(module).__name__}.{parts[-1]}".lower():
        return "norms"
    if "Router" in type(module).__name__ or any(map(_ROUTER.fullmatch, parts[-2:])):
        return "router"
    if "experts" in parts or inside(path, expert_paths):
        return "experts"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolutions"
    if is_linear(module) and parameter.ndim > 1:
        return "linear layers"
    return "biases" if name.endswith("bias") else "other"
