"""What a merged model holds from its earlier rounds: the zeros of a pruner and the grid of a quantizer.

config.json's "dovetail" (`dovetail.merge`) names both. The zeros are in the weights. The grid (scales and zero points,
without the codes) stays on the layer that was merged, in memory, and `save_pretrained` writes it beside the weights
into `dovetail/grid.safetensors`, which other programs ignore. A chain on such a model continues from both, or gives
them up and says so (`CheckedChain.given_up`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Link, Pruner, Quantizer
from dovetail.chains.notation import chain
from dovetail.errors import ChainError, DovetailError, HistoryWarning, LoadError
from dovetail.files import atomic, open_tensors
from dovetail.models.targets import all_layers

GRIDS = "dovetail/grid.safetensors"
"""In a folder of its own: some programs read every safetensors file that lies beside the weights."""
_ATTRIBUTE = "dovetail_grid"


@dataclass(frozen=True)
class Grid:
    """The grid of a stock layer that was merged on it: a quantizer with all its arguments, and its tensors by name."""

    identity: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, quantized: QuantizedWeight) -> Grid:
        """Return the grid of a quantized weight, whose tensors it shares."""
        return cls(quantized.identity, {name: t for name, t in quantized.named_buffers() if name != "codes"})

    def encode(self, where: str, weight_oi: Tensor) -> QuantizedWeight:
        """Return a weight on this grid as codes; raise ChainError where it is not on the grid, exactly."""
        found, links = None, chain(self.identity).links
        if isinstance(links[0], Quantizer):
            empty = links[0].empty((weight_oi.shape[0], weight_oi.shape[1]))
            with suppress(RuntimeError):  # tensors of other names or shapes
                empty.load_state_dict({**self.tensors, "codes": empty.codes})
                found = empty.to(weight_oi.device).encode(weight_oi)
        if found is None or not torch.equal(found.dequantize(torch.empty_like(weight_oi)), weight_oi):
            raise ChainError(
                where,
                found=f"weights that are not on the grid that they were merged on, {self.identity[:200]}",
                rule="a chain continues on the grid of an unchanged model",
                fix='load the merged model again, or remove "dovetail" from its config to start without its grid',
            )
        return found


def held(model_or_config: Any, layer: str = "") -> tuple[Link, ...]:
    """Return the pruner and the quantizer that a merged model's config names, as far as it names them.

    layer   path of a layer, which may have had other arguments than the rest

    A config comes from outside: an entry that Dovetail did not write says nothing.
    """
    config = getattr(model_or_config, "config", model_or_config)
    said = getattr(config, "dovetail", None)
    if not isinstance(said, dict) or not isinstance(said.get("chain"), str) or "base_fingerprint" not in said:
        return ()
    own = held_by_layers(config).get(layer)
    said = said | (own if isinstance(own, dict) else {})
    grid = said.get("quantizer")
    texts: list[tuple[type[Link], Any]] = [
        (Pruner, said.get("pruner", said["chain"])),  # notes of earlier versions name the pruner in the chain only
        (Quantizer, None if isinstance(grid, str) and grid.startswith("torch.") else grid),
    ]
    found: list[Link] = []
    for kind, text in texts:
        try:
            found += [link for link in chain(text) if isinstance(link, kind)][-1:] if isinstance(text, str) else []
        except DovetailError as error:
            what = f"config.json's dovetail entry names {text}, which is not a known link: ignored ({error.found})"
            warnings.warn(what, HistoryWarning, stacklevel=2)
    return tuple(found)


def held_by_layers(model_or_config: Any) -> dict[str, Any]:
    """Return path of a layer -> what it has in place of that which the config names for the whole model."""
    said = getattr(getattr(model_or_config, "config", model_or_config), "dovetail", None)
    own = said.get("layers") if isinstance(said, dict) else None
    return own if isinstance(own, dict) else {}


def grids(model: nn.Module) -> dict[str, Grid]:
    """Return the grids of a model's stock layers by their paths."""
    return {
        ".".join(filter(None, (path, name))): grid
        for path, module in model.named_modules()
        for name, grid in vars(module).get(_ATTRIBUTE, {}).items()
    }


def grid_of(module: nn.Module) -> Grid | None:
    """Return the grid that a stock layer was merged on."""
    return vars(module).get(_ATTRIBUTE, {}).get("")


def put_grid(module: nn.Module, grid: Grid) -> None:
    """Let a stock layer remember its grid."""
    put_grids(module, {"": grid})


def put_grids(module: nn.Module, found: Mapping[str, Grid]) -> None:
    """Let a stock module remember the grids of its layers by their names in it; "" is the module itself."""
    setattr(module, _ATTRIBUTE, dict(found))


def read_grids(folder: Path, model: nn.Module) -> None:
    """Let the layers of a stock model remember the grids in its folder, where there are any. Raises LoadError."""
    path = folder / GRIDS
    if not path.is_file():
        return
    found: dict[str, tuple[str, dict[str, Tensor]]] = {}
    with open_tensors(path, owner="a merged model's folder") as file:
        said = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            layer, _, name = key.rpartition("/")
            found.setdefault(layer, (said.get(layer, ""), {}))[1][name] = file.get_tensor(key)
    layers, modules = {layer.name for layer in all_layers(model)}, dict(model.named_modules())
    by_module: dict[nn.Module, dict[str, Grid]] = {}
    for layer, (identity, tensors) in found.items():
        if layer not in layers or not identity:
            rule = "the grids must be those of layers of the model"
            raise LoadError(str(path), found=f"a grid of {layer[:200]!r}", rule=rule, fix="copy the folder again")
        owner = layer if layer in modules else layer.rsplit(".", 2)[0]  # of an expert
        by_module.setdefault(modules[owner], {})[layer.removeprefix(owner).removeprefix(".")] = Grid(identity, tensors)
    for module, own in by_module.items():
        put_grids(module, own)
    guard_saving(model)


def guard_saving(model: nn.Module) -> None:
    """Let `model.save_pretrained` refuse a chain that stock transformers could not load, and write the grids.

    The same holds for each part of the model that can be saved by itself. What has no chain and no grid gets its own
    `save_pretrained` back.
    """
    for part in model.modules():
        vars(part).pop("save_pretrained", None)
        if callable(getattr(type(part), "save_pretrained", None)) and (chain_layers(part) or grids(part)):
            part.save_pretrained = _Saving(part)  # type: ignore[assignment]


class _Saving:
    """The `save_pretrained` of a model that is under a chain, or was."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if layers := chain_layers(model):
            merged = all(layer.record is None for layer in layers.values())
            raise ChainError(
                f"save_pretrained of a {type(model).__name__}",
                found="a packed model" if merged else "a chain that is not merged",
                rule="save_pretrained must write what transformers loads, and transformers knows no chain",
                fix="call dovetail.save_packed(model, folder), or dovetail.to_stock(model) first"
                if merged
                else "call dovetail.save_adapter(model, folder), or dovetail.merge(model) first",
            )
        result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
        if found := grids(model):
            tensors = {f"{name}/{key}": t.cpu() for name, grid in found.items() for key, t in grid.tensors.items()}
            path = Path(save_directory) / GRIDS
            path.parent.mkdir(exist_ok=True)
            with atomic(path) as part:
                save_file(tensors, part, metadata={name: grid.identity for name, grid in found.items()})
        return result
