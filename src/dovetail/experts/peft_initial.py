"""What a peft adapter's parameters are before training, as far as that isn't zero: θ_init of its task vector.

    ia3_l                    1
    vera_lambda_d            d_initial
    lora_magnitude_vector    row norms of the base's weight (DoRA §4.1)
    modules_to_save          the base's own weights; of a new classifier, 0

The A of a LoRA starts at random numbers that its files don't tell, so it stands for itself, as in ComPEFT's released
experts. A Dovetail adapter's are known from its seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.checkpoint.formats.peft.write import CLASSIFIER_HEADS, PREFIX, PROJECTIONS
from dovetail.errors import DovetailError, LoadError
from dovetail.links.adapt import VeRA
from dovetail.models.layouts import layout_of

_CONSTANTS = (*PROJECTIONS.values(), "base_model.model.vera_A", "base_model.model.vera_B")


def learned(names: Iterable[str]) -> list[str]:
    """Without VeRA's projections, which are drawn from the config's key and never trained."""
    return [name for name in names if not name.startswith(_CONSTANTS)]


def check_projections(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """LoadError for projections of VeRA that its config's key doesn't draw: an expert has the key alone."""
    stored = {name[-1]: tensor for name, tensor in tensors.items() if name.startswith(_CONSTANTS) and tensor.ndim == 2}
    if stored.keys() != {"A", "B"}:
        return
    a, b = stored["A"], stored["B"]
    try:
        drawn = VeRA(r=a.shape[0]).constants((b.shape[0], a.shape[1]), config["projection_prng_key"], torch.float32)
        same = all(torch.allclose(drawn[key].to(t.dtype).float(), t.float(), rtol=1e-2) for key, t in stored.items())
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError, DovetailError):
        same = False
    if not same:
        rule = "VeRA's projections are drawn from projection_prng_key; an expert doesn't hold others"
        raise LoadError("peft adapter", found="projections that its key doesn't draw", rule=rule)


def peft_initial(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base: nn.Module | None
) -> dict[str, Tensor]:
    """Initial values by tensor, float32 on the CPU; those that aren't there are 0.

    config  adapter_config.json
    shapes  of the adapter's tensors, by their names in adapter_model.safetensors
    base    the model that the adapter is for, before or under it; needed for magnitudes and saved modules alone
    errors  LoadError where the base is needed and isn't there, or hasn't such a layer
    """
    found, saved = {}, tuple(config.get("modules_to_save") or ())
    for name, shape in shapes.items():
        path, _, last = name.removeprefix(PREFIX).rpartition(".")
        if last == "ia3_l":
            found[name] = torch.ones(shape)
        elif last == "vera_lambda_d":
            found[name] = torch.full(shape, float(config.get("d_initial", 0.1)))
        elif last == "lora_magnitude_vector" or path.endswith("lora_magnitude_vector"):
            layer = _module(base, path.removesuffix(".lora_magnitude_vector"), name)
            weight_oi = layout_of(name, layer).matrix(layer.get_parameter("weight").detach())
            found[name] = weight_oi.float().norm(dim=1).cpu().view(shape)
        elif saved and path.endswith(saved) and not path.endswith(CLASSIFIER_HEADS):
            found[name] = _module(base, path, name).get_parameter(last).detach().float().cpu()
    for name, start in found.items():
        if tuple(start.shape) != shapes[name]:
            rule = f"the base's is {list(start.shape)}"
            raise LoadError(f"task vector at {name}", found=f"shape {list(shapes[name])}", rule=rule)
    return found


def _module(base: nn.Module | None, path: str, name: str) -> nn.Module:
    if base is None:
        rule = "it starts from the base's weights"
        raise LoadError(f"task vector at {name}", found="no base", rule=rule, fix="give the base model")
    for inside in (f"{path}.base_layer", f"{path}.original_module", path):  # as stock peft wraps them
        try:
            return base.get_submodule(inside)
        except AttributeError:
            continue
    raise LoadError(f"task vector at {name}", found="no such layer in the base", rule="the adapter belongs to the base")
