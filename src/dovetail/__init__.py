"""Dovetail: adapters, quantization and pruning as links of one chain, merged without loss."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail import experts
    from dovetail.adapt.elastic import extract
    from dovetail.adapter import load_adapter, save_adapter
    from dovetail.apply import advance, apply
    from dovetail.chain.notation import Chain, chain
    from dovetail.errors import DovetailError
    from dovetail.evaluate import evaluate
    from dovetail.flow import run
    from dovetail.footprint import Footprint, footprint
    from dovetail.load import load
    from dovetail.merge import MergeReport, merge, to_stock
    from dovetail.packed import save_packed
    from dovetail.packed_file import PackedSize, packed_size
    from dovetail.plan import plan
    from dovetail.recipe import Recipe
    from dovetail.search import search_ranks
    from dovetail.sparsify.scored import scoring
    from dovetail.study.runner import study
    from dovetail.tasks import Task
    from dovetail.train import TrainReport, train

_HOME = {
    "Chain": "chain.notation",
    "DovetailError": "errors",
    "Footprint": "footprint",
    "MergeReport": "merge",
    "PackedSize": "packed_file",
    "Recipe": "recipe",
    "Task": "tasks",
    "TrainReport": "train",
    "advance": "apply",
    "apply": "apply",
    "chain": "chain.notation",
    "evaluate": "evaluate",
    "extract": "adapt.elastic",
    "footprint": "footprint",
    "load": "load",
    "load_adapter": "adapter",
    "merge": "merge",
    "packed_size": "packed_file",
    "plan": "plan",
    "run": "flow",
    "save_adapter": "adapter",
    "save_packed": "packed",
    "scoring": "sparsify.scored",
    "search_ranks": "search",
    "study": "study.runner",
    "to_stock": "merge",
    "train": "train",
}
"""Public name -> the module that holds it, imported on first use: `dovetail --help` must not wait for torch."""

__all__ = [
    "Chain",
    "DovetailError",
    "Footprint",
    "MergeReport",
    "PackedSize",
    "Recipe",
    "Task",
    "TrainReport",
    "advance",
    "apply",
    "chain",
    "evaluate",
    "experts",
    "extract",
    "footprint",
    "load",
    "load_adapter",
    "merge",
    "packed_size",
    "plan",
    "run",
    "save_adapter",
    "save_packed",
    "scoring",
    "search_ranks",
    "study",
    "to_stock",
    "train",
]


class _Package(types.ModuleType):
    """`dovetail.merge` is the function, also after the module of that name has been imported."""

    def __getattr__(self, name: str) -> Any:
        if name == "experts":
            return importlib.import_module("dovetail.experts")
        if name not in _HOME:
            raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"dovetail.{_HOME[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, types.ModuleType):
            return  # the import system binds a submodule to its name
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_HOME, "experts"]


sys.modules[__name__].__class__ = _Package
