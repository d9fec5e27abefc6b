"""The cheap trial: many trainings of one model whose layers have other bits, ranks and other arguments each time.

A run loads the model, calibrates, prunes and quantizes all layers, trains and scores. Of these, a `Workbench` does
everything but the last two once: it quantizes each layer with each of the quantizers that the space has for it, and a
trial puts the bases of its assignment in place by reference.

    bases[layer, applied links]  ->  layer.base        then: initial values, training, score, and back

A trial gives the bits of a fresh run of its recipe (tests/searches/test_trial.py). That needs bases that do not depend
on the choice for other layers. So layers are calibrated on the outputs of the original blocks
(`calibration: {inputs: original}`), and no link that the space changes comes before a link that needs statistics.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.assignment import Assignment, assign
from dovetail.chains.layer.attach import attach
from dovetail.chains.layer.base import Base
from dovetail.chains.layer.held import held
from dovetail.chains.link import Adapter, Chain, Link, Pruner, Quantizer, arguments
from dovetail.chains.statistics import InputStatistics
from dovetail.checkpoint.config import best_device
from dovetail.checkpoint.footprint import Footprint, footprint
from dovetail.compression.apply import freeze, start_links
from dovetail.compression.blocks import calibrate_blocks
from dovetail.compression.compress import allocated, refuse_bad_weights
from dovetail.errors import SearchError
from dovetail.files import on_full_disk, only_writer, read_json, writing
from dovetail.runs.recipe import Recipe
from dovetail.runs.steps import calibration, load_base
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.training.checkpoints import last_checkpoint
from dovetail.training.optimizer import trained_parts
from dovetail.training.train import REPORT, StageReport, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE_NBYTES = 4 << 30
"""The quantized bases that are kept in memory; beyond that they are read from a file that is mapped into memory."""

BASES = "bases.safetensors"

Applied = tuple[Link, ...]
"""The pruners and quantizers of a layer, with their arguments."""


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    score                  of the task's metric, on the scored records
    loss                   of the last training step, in nats per token (`StageReport.losses`); None without training
    steps                  that were trained, with those of earlier rungs
    footprint              of the model with its adapters
    peak_memory_nbytes     of training
    seconds                of training and scoring
    """

    score: float
    loss: float | None
    steps: int
    footprint: Footprint
    peak_memory_nbytes: int
    seconds: float


class Workbench:
    """A model that is loaded, tokenized and calibrated once, for trials of many assignments.

    recipe   its chain has one stage
    task     with the splits that trials are trained and scored on
    applied  the applied links of each layer: layer -> the choices of the space; None: those of the recipe's chain
    starts   keep the weights before quantizing for all layers, because a candidate's constraint may start from them;
             False: for the layers where that of the recipe does
    samples  records of the validation split that a trial is scored on; None: all
    folder   for the bases beyond `cache_nbytes`
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        *,
        applied: Mapping[str, Sequence[Applied]] | None = None,
        starts: bool = False,
        samples: int | None = None,
        folder: Path | None = None,
        cache_nbytes: int = CACHE_NBYTES,
        progress: bool = False,
    ) -> None:
        self.recipe, self.task, self.samples = recipe, task, samples
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_base(recipe, task)
        nn.Module.to(self.model, best_device())
        self.model.requires_grad_(False)
        self.batches = calibration(recipe, task, self.model, self.tokenizer)
        common = assign(recipe.chain, recipe.layers, held(self.model))
        check_one_stage(common)
        self.record, self.targets = attach(self.model, common, recipe.targets, recipe.seed)
        self._assignment = self.record.assignment
        self._starts = {name for name in self.record.layers if starts or self._assignment.at(name).stages[0].keep_start}
        self._original = {name: layer.base for name, layer in self.record.layers.items()}
        refuse_bad_weights(self.record.layers)
        wanted = applied or {name: [self._assignment.at(name).stages[0].applied] for name in self.record.layers}
        self._bases = self._compressed(wanted, progress)
        self._spill(folder, cache_nbytes)
        self._back()

    @property
    def layers(self) -> list[str]:
        """The paths of the layers under the chain."""
        return list(self.record.layers)

    def base(self, layer: str, applied: Applied) -> Base:
        """Return the pruned and quantized base of a layer; with no applied links, the original one."""
        if applied and (layer, applied) not in self._bases:
            raise SearchError(
                f"trial at {layer}",
                found=" >> ".join(map(str, applied)),
                rule="a trial can use the pruners and quantizers of its workbench only",
                fix="pass them to the Workbench",
            )
        return self._bases[layer, applied] if applied else self._original[layer]

    def trial(self, layers: Mapping[str, str], steps: int | None = None, *, folder: Path | None = None) -> Trial:
        """Train and score an assignment, and put the model back as it was.

        layers   pattern -> chain, as in a recipe
        steps    stop after so many steps of the training that the recipe asks for; None: train to the end
        folder   of checkpoints: a trial of the same assignment goes on from the last one in it. Raises InUse while
                 another process trains in it
        returns  the result; the same bits as a run of the recipe with these layers gives
        errors   SearchError for applied links that the workbench does not have; NotFinite and TrainError where training
                 diverges. The model is put back then, too
        """
        started = perf_counter()
        with self.candidate(layers):
            trained = self._train(steps, folder) if trained_parts(self.model) else None
            return Trial(
                score=self.score(),
                loss=None if trained is None else trained.losses[-1][1],
                steps=0 if trained is None else trained.steps,
                footprint=footprint(self.model),
                peak_memory_nbytes=0 if trained is None else trained.peak_memory_nbytes,
                seconds=perf_counter() - started,
            )

    def _train(self, steps: int | None, folder: Path | None) -> StageReport:
        """Train the candidate on the model, from the last checkpoint in the folder that is not beyond `steps`."""
        with nullcontext() if folder is None else only_writer(folder.with_name(f"{folder.name}-trial")):
            resume = folder is not None and _can_resume(folder / "stage-1", steps)
            if folder is not None and not resume:
                shutil.rmtree(folder, ignore_errors=True)
            report = train(
                self.model, self.tokenizer, self.task, seed=self.recipe.seed, progress=False, output_dir=folder,
                resume=resume, stop_after=steps, **self.recipe.train.model_dump(),
            )  # fmt: skip
        return report.stages[0]

    def score(self) -> float:
        """Return the task's metric of the model as it stands, on the scored records."""
        found = evaluate(
            self.model, self.tokenizer, self.task, split="validation", limit=self.samples, progress=False,
            batch_size=self.recipe.evaluate.batch_size,
        )  # fmt: skip
        return found[self.task.name][self.task.metric]

    @contextmanager
    def candidate(self, layers: Mapping[str, str]) -> Iterator[PreTrainedModel]:
        """Put an assignment on the model, with untrained adapters, while entered."""
        assignment = assign(self.recipe.chain, {**self.recipe.layers, **layers}, held(self.model))
        with self._under(assignment.on(self.targets, lambda name: held(self.model, name))):
            yield self.model

    @contextmanager
    def tuned(self, steps: int) -> Iterator[PreTrainedModel]:
        """Train the adapters of the recipe on the original weights, and leave them on the model while entered.

        Scores of layers are taken with them: on a model that does not know the task, its loss says nothing about bits.
        """
        adapters = tuple(link for link in self._assignment.chain if isinstance(link, Adapter))
        with self._under(assign(Chain(adapters)) if adapters else None):
            if adapters:
                settings: dict[str, Any] = self.recipe.train.model_dump() | {"max_steps": steps}
                train(
                    self.model,
                    self.tokenizer,
                    self.task,
                    seed=self.recipe.seed,
                    progress=False,
                    **settings,
                )
            yield self.model

    @contextmanager
    def _under(self, assignment: Assignment | None) -> Iterator[None]:
        """Put bases and untrained links on the layers while entered; then put everything back.

        assignment  None: the original weights without links
        """
        model: Any = self.model
        data = [(tensor, tensor.data) for tensor in self._outside()]
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        modes = [(module, module.training) for module in model.modules()]
        ends = model.generation_config.eos_token_id if model.can_generate() else None
        values: list[tuple[Tensor, Tensor]] = []
        try:
            if assignment is not None:
                self.record.assignment = assignment
                for name, layer in self.record.layers.items():
                    stage = assignment.at(name).stages[0]
                    base = self.base(name, stage.applied)
                    if stage.keep_start and name not in self._starts:
                        found = "regrid from the weights, of which the workbench kept none"
                        rule = "a workbench keeps the weights before quantizing if its recipe or its space needs them"
                        raise SearchError(f"trial at {name}", found=found, rule=rule, fix="pass starts=True")
                    # Training in bf16 rounds the frozen base in place.
                    layer.base = copied(base) if self.recipe.train.bf16 else base
                start_links(self.record)
                freeze(model, self.record)
            changing = (t for t in self._outside() if t.requires_grad or not isinstance(t, nn.Parameter))
            values = [(tensor, tensor.detach().clone()) for tensor in changing]
            yield
        finally:
            self._back()
            for tensor, kept in data:
                tensor.data = kept
            for tensor, value in values:
                tensor.data.copy_(value)
            for parameter, asked in flags:
                parameter.requires_grad_(asked)
                parameter.grad = None
            for module, training in modes:
                module.training = training
            if model.can_generate():
                model.generation_config.eos_token_id = ends

    def _back(self) -> None:
        """Put the original bases on the layers, without links."""
        for name, layer in self.record.layers.items():
            layer.set_links([])
            layer.base = self._original[name]
        self.record.assignment = self._assignment

    def _outside(self) -> list[Tensor]:
        """Return the parameters and buffers outside the chain."""
        inside = {id(t) for layer in self.record.layers.values() for t in (*layer.parameters(), *layer.buffers())}
        return [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in inside]

    # The bases.

    def _compressed(self, wanted: Mapping[str, Sequence[Applied]], progress: bool) -> dict[tuple[str, Applied], Base]:
        """Prune and quantize each layer with each of its choices of applied links."""
        made: dict[tuple[str, Applied], Base] = {(name, ()): base for name, base in self._original.items()}
        count = len(self._assignment.chain.stages[0].applied)
        for place in range(count):
            choices = {name: sorted({each[: place + 1] for each in wanted[name]}, key=str) for name in wanted}
            first = next(iter(choices.values()))[0][place]
            self._make(made, choices, first, progress)
        return {(name, links): base for (name, links), base in made.items() if len(links) == count and count}

    def _make(
        self, made: dict[tuple[str, Applied], Base], choices: Mapping[str, Sequence[Applied]], first: Link,
        progress: bool,
    ) -> None:  # fmt: skip
        """Apply the last link of each choice to the base that the links before it made.

        made    (layer, links) -> base, which is filled
        first   one of the last links, whose class all of them have
        """
        layers, own = self.record.layers, {}
        outlier = isinstance(first, Pruner) and "outlier" in {
            arguments(each[-1])["allocation"] for each in _all(choices)
        }
        if first.statistics or outlier:
            for name, options in choices.items():
                if len({links[:-1] for links in options}) > 1 or (outlier and len(options) > 1):
                    raise SearchError(
                        f"search.space at {name}",
                        found=f"{len(options)} choices up to {options[0][-1]}",
                        rule=f"links {'up to' if outlier else 'before'} {first.name} must be the same for all "
                        f"candidates, because {first.name} depends on the weights of all layers",
                        fix=f"search the arguments of {'' if outlier else f'{first.name} and of '}later links",
                    )
                layers[name].base = made[name, options[0][:-1]]
        if outlier:
            assert isinstance(first, Pruner)
            own = allocated(self.model, {name: layers[name] for name in choices}, first, self.batches, progress)

        def one(name: str, statistics: InputStatistics | None) -> None:
            stage = self._assignment.at(name).stages[0]
            for links in choices[name]:
                base, link = copied(made[name, links[:-1]]), own.get(name, links[-1])
                if isinstance(link, Pruner):
                    before = base.matrix()
                    keep, weight = link.prune(before, statistics)
                    base.set_mask(keep, None if weight is before else weight)
                elif isinstance(link, Quantizer):
                    base.quantize(link, statistics, name in self._starts)
                if not stage.keep_mask:
                    base.mask_bits = None
                made[name, links] = base

        def block(found: dict[str, InputStatistics]) -> None:
            for name in list(found):
                one(name, found.pop(name))

        if first.statistics:
            calibrate_blocks(
                self.model, {name: layers[name] for name in choices}, self.batches, block, wanted=first.statistics,
                inputs="original", title=first.name, progress=progress,
            )  # fmt: skip
        else:
            for name in choices:
                one(name, None)

    def _spill(self, folder: Path | None, cache_nbytes: int) -> None:
        """Move the tensors of bases beyond `cache_nbytes` into a file in the folder, and map it into memory."""
        if folder is None or best_device().type != "cpu":
            return
        seen = {parameter.data_ptr() for base in self._original.values() for parameter in base.parameters()}
        held_nbytes = 0
        beyond: dict[int, Tensor] = {}
        for base in self._bases.values():
            for _, _, tensor in _buffers(base):
                if tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    held_nbytes += tensor.nbytes
                    if held_nbytes > cache_nbytes:
                        beyond[tensor.data_ptr()] = tensor
        if not beyond:
            return
        with writing(folder), on_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_file({str(place): tensor.contiguous() for place, tensor in beyond.items()}, folder / BASES)
        with safe_open(folder / BASES, framework="pt") as file:
            mapped = {place: file.get_tensor(str(place)) for place in beyond}
        for base in self._bases.values():
            for module, name, tensor in _buffers(base):
                if tensor.data_ptr() in mapped:
                    module._buffers[name] = mapped[tensor.data_ptr()]


def _can_resume(stage: Path, steps: int | None) -> bool:
    """Return whether a training of so many steps can go on from what is in the folder of a stage.

    It cannot from a later step, nor from the checkpoint of its last one, after which nothing would be trained.
    """
    if (stage / REPORT).exists():
        done = read_json(stage / REPORT, StageReport, rule="the report of a stage must be as Dovetail writes it").steps
        return steps is None or done <= steps
    checkpoint = last_checkpoint(stage)
    return checkpoint is not None and (steps is None or int(checkpoint.name.split("-")[1]) < steps)


def check_one_stage(assignment: Assignment) -> None:
    """Raise SearchError for a chain whose bases depend on more than its pruners and quantizers.

    The later stages of a chain depend on how the first one trained, and a decomposition on the adapter.
    """
    first, *later = assignment.chain.stages
    decomposing = [links.stages[0].decomposing for links in assignment.chains]
    if (link := next(filter(None, decomposing), None)) is not None:
        rule = "a search of layers quantizes each layer once for all ranks: adapters must start as the identity"
        fix = f"search with {link.name}, and start from the decomposition in a run of the best assignment"
        raise SearchError(f"search of {assignment.chain}", found=str(link), rule=rule, fix=fix)
    if later:
        found = f"{1 + len(later)} stages"
        rule = "a search of layers needs a chain of one stage: pruners and quantizers, then adapters and constraints"
        fix = f"search {first}, and start the next chain from its result"
        raise SearchError(f"search of {assignment.chain}", found=found, rule=rule, fix=fix)


def copied(base: Base) -> Base:
    """Return another base with the same tensors, of which each can be replaced."""
    made = _shallow(base)
    assert isinstance(made, Base)
    made._row_square = {}
    return made


def _shallow(module: nn.Module) -> nn.Module:
    made = copy.copy(module)
    parameters = {name: None if p is None else nn.Parameter(p.data, False) for name, p in module._parameters.items()}
    made.__dict__ |= {
        "_parameters": parameters,
        "_buffers": dict(module._buffers),
        "_modules": {name: None if child is None else _shallow(child) for name, child in module._modules.items()},
    }
    return made


def _buffers(base: Base) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the tensors of a base that no parameter holds: codes, scales, masks, the weights before quantizing."""
    return [
        (module, name, tensor)
        for module in base.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


def _all(choices: Mapping[str, Sequence[Applied]]) -> Iterator[Applied]:
    return (links for options in choices.values() for links in options)
