"""The settings of training: one list for recipes and for `dovetail.train`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from dovetail import processes
from dovetail.errors import TrainError
from dovetail.files import refusal
from dovetail.tasks.spec import Part, Positive
from dovetail.training.presets import TRAINING_PRESETS

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""Experiment tracker -> the packages of which it needs one."""


class Training(Part):
    """The keys of a recipe's `train` part; each is a keyword argument of `dovetail.train`.

    preset                  name of settings that a paper reports (`dovetail.training.presets`); others take precedence
    epochs, max_steps       of each stage; max_steps takes precedence over epochs
    batch_size              rows of a batch, over all processes; a step takes `gradient_accumulation` batches
    lr_scale                multiplies every learning rate (CLAM's c)
    link_learning_rate      of every link of the chain, in place of its own; lr_scale multiplies it too
    head_learning_rate      of parameters that are trained outside the chain: new heads
    schedule, warmup        linear or cosine to 0, or constant; fraction of the steps of a linear warm-up from 0
    weight_decay            of matrices; vectors (scales, biases, norms) have none
    optimizer               AdamW, with its state in 8 bits, or paged to the processor's memory, or both; all but adamw
                            need bitsandbytes, and paging a CUDA GPU
    max_grad_norm           gradients are clipped to this norm
    max_length              tokens of a row; fewer if the model has fewer positions
    packing                 put several short rows into one of max_length; batch_size counts these
    bf16                    round the frozen base to bfloat16 permanently, and run the forward pass under autocast
    gradient_checkpointing  compute the activations of each block again in the backward pass: less memory, slower
    keep_weights            keep the weights that chains with remask or regrid make, from the forward to the backward
                            pass and between the batches of a step: faster, for a copy of these weights in memory;
                            auto: on a processor, if the predicted peak with them is within the free memory
    torch_compile           run the model by torch.compile, as one graph: fewer and larger operations. The first steps
                            compile it, and need a C++ compiler
    group_by_length         put rows of similar length into a batch; the longest row is in the second step
    evaluate_every          steps between evaluations on the validation split; None: no evaluation
    evaluate_limit          evaluate only this many records
    checkpoint_every        steps between checkpoints
    report_to               experiment tracker that receives losses and validation scores
    """

    preset: str | None = None
    epochs: PositiveFloat = 3.0
    max_steps: Positive | None = None
    batch_size: Positive = 32
    gradient_accumulation: Positive = 1
    lr_scale: PositiveFloat = 1.0
    link_learning_rate: PositiveFloat | None = None
    head_learning_rate: PositiveFloat = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    max_grad_norm: PositiveFloat = 1.0
    max_length: Annotated[int, Field(ge=2)] = 512
    packing: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = False
    keep_weights: Literal["auto"] | bool = "auto"
    torch_compile: bool = False
    group_by_length: bool = True
    evaluate_every: Positive | None = None
    evaluate_limit: Positive | None = None
    checkpoint_every: Positive = 200
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_preset(cls, value: Any) -> Any:
        name = value.get("preset") if isinstance(value, dict) else None
        if name is None:
            return value
        if name not in TRAINING_PRESETS:
            raise ValueError("the preset must be one of " + ", ".join(TRAINING_PRESETS))
        return {**TRAINING_PRESETS[name], **value}


class TrainSettings(Training):
    """All settings of `dovetail.train`; TrainError for an unknown name or a value out of range.

    learning_rate   of a model without a chain; each link has its own (`Adapter.learning_rate`)
    seed            of the order of rows, of dropout and of the links of later stages
    """

    learning_rate: PositiveFloat = 1e-4
    seed: int = 0

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            known = list(type(self).model_fields)
            raise refusal("train", error, kind=TrainError, keys=lambda _: ("train", known)) from None

    def fixed(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the run that it continues."""
        free = {"keep_weights", "evaluate_every", "evaluate_limit", "checkpoint_every", "report_to"}
        return self.model_dump(exclude=free)


def _has_cuda() -> bool:
    import torch  # which reading a recipe need not wait for

    return torch.cuda.is_available()


def check_environment(report_to: str, optimizer: str = "adamw") -> None:
    """Raise TrainError if a tracker or an optimizer is not there."""
    if optimizer != "adamw" and find_spec("bitsandbytes") is None:
        raise TrainError(
            f"train, optimizer={optimizer}",
            found="the package bitsandbytes is not installed",
            rule="8-bit and paged optimizers are those of bitsandbytes",
            fix="pip install bitsandbytes, or leave optimizer out",
        )
    if optimizer.startswith("paged") and not _has_cuda():
        raise TrainError(
            f"train, optimizer={optimizer}",
            found="no CUDA GPU",
            rule="the state of a paged optimizer moves between a CUDA GPU and the processor",
            fix=f"set optimizer: {optimizer.removeprefix('paged_')}",
        )
    packages = _REPORTERS.get(report_to, ())
    if packages and not any(map(find_spec, packages)):
        raise TrainError(
            f"train, report_to={report_to}",
            found=f"the package {packages[0]} is not installed",
            rule="report_to must name an installed experiment tracker",
            fix=f"pip install {packages[0]}",
        )


def check_processes(batch_size: int) -> None:
    """Raise TrainError where a process of this run would get no row of a batch."""
    if batch_size < processes.count():
        raise TrainError(
            "train",
            found=f"batch_size={batch_size} and {processes.count()} processes",
            rule="each process trains on a part of every batch",
            fix=f"set batch_size to at least {processes.count()}",
        )
