"""Models that compute NaN or infinity: which of their modules is the first to do so.

A comparison with NaN is false, so an accuracy or an argmax of it means nothing. Code that finds one in the outputs of a
model runs the model once more, with a hook on every module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import DovetailError, NotFinite


def check_finite(
    where: str, model: nn.Module, run: Callable[[], object], *, fix: str = "", error: type[DovetailError] = NotFinite
) -> None:
    """Run a forward pass and raise the error of `not_finite` where a module returns NaN or infinity.

    The model's outputs alone do not show it: attention on processors returns finite numbers for queries that are NaN.
    """
    if first_not_finite(model, run) is not None:
        raise not_finite(where, model, run, fix=fix, error=error)


def not_finite(
    where: str, model: nn.Module, run: Callable[[], object], *, fix: str = "", error: type[DovetailError] = NotFinite
) -> DovetailError:
    """Return the error for a model whose outputs are not finite; it names the first module whose output is not.

    run   repeats the forward pass
    fix   what may help, where it is known
    """
    name = first_not_finite(model, run)
    if name is None:
        found = "NaN or infinite values, which no module returned"
    else:
        module = model.get_submodule(name) if name else model
        bad = [part for part, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
        found = f"NaN or infinite values, first returned by {name or type(model).__name__}"
        found += f", whose {bad[0]} is not finite" if bad else ""
        fix = f"load the weights of {name or 'the model'} again" if bad else fix
    return error(
        where,
        found=found,
        rule="the outputs of every module must be finite",
        fix=fix or "load the model in a dtype of larger range: bfloat16 or float32",
    )


def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Return the path of the module that is the first to return NaN or infinity in a forward pass, or None.

    A pass in which nothing but minus infinity occurs is taken for a finite one: that is how masks are written.
    """
    first: list[str] = []
    bad: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = None if bad else _first_tensor(output)
            if x is None or not x.is_floating_point() or bool(x.isfinite().all()):
                return
            first.append(name)
            if bool((x.isnan() | x.isposinf()).any()):
                bad.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if bad else None


def _first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor of a module's output; what comes after it may be masks."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return _first_tensor(output[0]) if isinstance(output, list | tuple) and output else None
