"""Dovetail: adapters, quantization and pruning as links of one chain, merged without loss."""

from typing import TYPE_CHECKING

from dovetail.lazy import lazy

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
    "experts": "",
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

lazy(__name__, _HOME)
