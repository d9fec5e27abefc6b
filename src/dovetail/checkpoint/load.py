"""Models and tokenizers: a hub id, a folder, a GGUF file, "playground", or of an installed package; packed or stock.

Only safetensors and GGUF files are read, and no code of a checkpoint is run unless the caller allows it. The checkpoint
must contain every weight except those of a new head; transformers would warn and continue with random numbers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dovetail.chains.layer.held import held, read_grids
from dovetail.checkpoint.config import (
    checked_dtype,
    folder_format,
    for_task,
    load_config,
    load_tokenizer,
    unreadable,
    weight_files,
)
from dovetail.checkpoint.formats.gguf import checked_header, forget_gguf, load_kept, warn_of_unread
from dovetail.checkpoint.formats.kept import load_kept_folder
from dovetail.checkpoint.mapped import load_mapped
from dovetail.checkpoint.packed import PACKED, load_packed
from dovetail.errors import LoadError
from dovetail.files import open_tensors
from dovetail.models.disk import Disk
from dovetail.models.dtypes import FLOATS
from dovetail.models.fingerprint import drop_stale_note
from dovetail.models.locate import resolve
from dovetail.models.targets import HEADS, heads
from dovetail.tasks.task import HEAD_KINDS
from dovetail.tasks.vocabulary import keep_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_MADE = 1 << 24
"""The most weights of a model that a checkpoint does not hold."""


def load(
    name_or_dir: str | Path,
    *,
    task_kind: str = "generation",
    num_labels: int | None = None,
    dtype: str | torch.dtype | None = None,
    grid: Literal["keep"] | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    disk: Disk | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model (on the CPU, eval mode) and its tokenizer (with a padding token), for tasks of one kind.

    name_or_dir        "playground"; a folder; a file NAME.gguf; "package:NAME/FOLDER", a folder or a GGUF file in an
                       installed Python package, or "package:NAME" for the only GGUF file of one; otherwise a hub id.
                       A folder of your own that is called playground: "./playground"
    task_kind          of dovetail.tasks: classification and regression put a head on the model, the others need a
                       causal or an encoder-decoder language model
    num_labels         outputs of a classification head; None: as the config says. Regression has one
    dtype              a key of FLOATS or such a torch.dtype; None: as stored, and float32 for blocks of GGUF
    grid               "keep": the linear layers of a GGUF file, or of a folder in compressed-tensors, bitsandbytes,
                       GPTQ, AWQ or MLX, keep its codes and scales, and a chain such as `keep >> lora(r=16) >> regrid`
                       changes codes alone. None: they are dense, or transformers decides
    trust_remote_code  run the checkpoint's own Python code
    seed               draws the weights of a new head, the only ones that may be missing from the checkpoint
    disk               leave the weights on disk, for `dovetail.apply` with the same one; the model must be a folder of
                       a stock checkpoint, and its weights must not be changed in place

    A folder that `save_packed` wrote gives the packed model, which runs from its codes; `to_stock` makes stock modules
    of it. A GGUF file (any that transformers converts; needs the gguf package) gives an ordinary model of dequantized
    weights, with the file's tokenizer and chat template. The global random state is unchanged. The tokenizer's padding
    token is its end token where it has none that the model has an embedding for; embeddings are never resized.
    Raises LoadError.
    """
    source, cast = resolve(name_or_dir), checked_dtype(dtype)
    _check_grid(name_or_dir, grid)
    config = load_config(name_or_dir, trust_remote_code=trust_remote_code)
    config, auto = for_task(config, task_kind, num_labels)
    packed = isinstance(source, Path) and (source / PACKED).is_file()
    header = checked_header(source) if isinstance(source, Path) and source.is_file() else None
    gguf: dict[str, str] = {}
    if header is not None:
        _check_sizes(f"model {name_or_dir}", {}, header.weights, config, auto, trust_remote_code)
        warn_of_unread(header)
        gguf["gguf_file"] = str(header.path.absolute())
        source, cast = header.path.parent, cast or FLOATS[header.dtype]
    elif isinstance(source, Path) and not packed:
        _check_sizes(f"model {name_or_dir}", *_stored(weight_files(source)), config, auto, trust_remote_code)
    tokenizer = load_tokenizer(name_or_dir, trust_remote_code=trust_remote_code)
    if disk is not None:
        if not isinstance(source, Path) or header is not None or packed or grid or task_kind in HEAD_KINDS:
            rule = "weights can stay on disk for a folder of a stock checkpoint, without a new head"
            raise LoadError(f"model {name_or_dir}", found="another kind of model", rule=rule, fix="leave disk out")
        model = _load_mapped(f"model {name_or_dir}", source, disk, config, auto, cast, trust_remote_code)
        _set_padding(name_or_dir, model, tokenizer)
        return model, tokenizer
    form = (
        folder_format(f"model {name_or_dir}", source, config)
        if grid == "keep" and header is None and not packed
        else None
    )
    if form is not None:
        where, files, made = f"model {name_or_dir}", weight_files(Path(source)), cast or checked_dtype(config.dtype)
        with unreadable(where), torch.random.fork_rng(devices=[]):
            model = load_kept_folder(where, Path(source), files, form, config, auto, made or torch.float32)
        _set_padding(name_or_dir, model, tokenizer)
        return model, tokenizer
    if header is not None and grid == "keep":
        with unreadable(f"model {name_or_dir}"), torch.random.fork_rng(devices=[]):
            model = load_kept(header, config, auto, cast or torch.float32)
        _set_padding(name_or_dir, model, tokenizer)
        return model, tokenizer
    if packed:
        with unreadable(f"model {name_or_dir}"), torch.random.fork_rng(devices=[]):
            model = load_packed(Path(source), config, auto, cast)
        _set_padding(name_or_dir, model, tokenizer)
        return model, tokenizer
    with unreadable(f"model {name_or_dir}"), torch.random.fork_rng(devices=[]), _held_report() as reports:
        torch.default_generator.manual_seed(seed)  # heads are drawn on the CPU; other devices' generators stay
        model, info = auto.from_pretrained(
            source,
            config=config,
            dtype=cast or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **gguf,
        )
    if header is not None:
        forget_gguf(model)
    _check_complete(name_or_dir, model, info, new_head=task_kind in HEAD_KINDS)
    if not all(key.partition(".")[0] in HEADS for key in info["unexpected_keys"]):
        for record in reports:
            logging.getLogger(record.name).handle(record)
    if dtype is None and not info["missing_keys"]:
        drop_stale_note(f"model {name_or_dir}", model)
    if isinstance(source, Path) and any(link.kind == "quantizer" for link in held(model)):
        read_grids(source, model)
    if grid == "keep" and not any(link.kind == "quantizer" for link in held(model)):
        raise _no_grid(name_or_dir)
    _set_padding(name_or_dir, model, tokenizer)
    return model.eval(), tokenizer


def _load_mapped(
    where: str, folder: Path, disk: Disk, config: PreTrainedConfig, auto: Any, dtype: torch.dtype | None, trust: bool
) -> PreTrainedModel:
    from transformers import GenerationConfig

    if getattr(config, "quantization_config", None) is not None:
        rule = "weights can stay on disk for a checkpoint of dense weights"
        raise LoadError(where, found="a quantized checkpoint", rule=rule, fix="leave disk out")
    made = dtype or checked_dtype(config.dtype) or torch.float32
    with unreadable(where), torch.random.fork_rng(devices=[]):
        model, info = load_mapped(disk, weight_files(folder), config, auto, made, trust)
        model.config.name_or_path = str(folder)
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        elif model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(
                folder, config_file_name="config.json", _from_model_config=True
            )
    _check_complete(where, model, info, new_head=False)
    if dtype is None:
        drop_stale_note(where, model, disk)
    if any(link.kind == "quantizer" for link in held(model)):
        read_grids(folder, model)
    return model


def load_like(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint into a new model of the class and configuration of another, with transformers' conversions.

    returns  the model, and transformers' names of missing, unexpected and mismatched tensors, which the caller checks
    errors   LoadError for files that transformers cannot read
    """
    weight_files(folder)
    made: Any = type(model)
    with unreadable(f"model {folder}"), torch.random.fork_rng(devices=[]), _held_report():
        loaded, info = made.from_pretrained(
            folder,
            config=copy.deepcopy(model.config),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return loaded, info


def _check_grid(name: str | Path, grid: str | None) -> None:
    if grid not in (None, "keep"):
        rule, fix = "grid must be keep or none", "pass grid='keep', or leave it out"
        raise LoadError(f"model {name}", found=f"grid={str(grid)[:60]}", rule=rule, fix=fix)


def _no_grid(name: str | Path) -> LoadError:
    return LoadError(
        f"model {name}",
        found="a dense model",
        rule="grid=keep keeps the grid of a GGUF file, of a quantized folder, or of a model that Dovetail merged",
        fix="leave grid out, and use a quantizer such as int(bits=4) in place of keep",
    )


def _stored(files: list[Path]) -> tuple[dict[str, list[int]], int]:
    """Return the shapes of the tensors of safetensors files, and the most weights that they can hold."""
    shapes: dict[str, list[int]] = {}
    held = 0
    for path in files:
        with open_tensors(path, owner="a checkpoint") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(key)
                shapes[key], dtype = part.get_shape(), part.get_dtype()
                # An integer may hold as many packed codes as it has bits; BOOL has 8.
                bits = int("".join(filter(str.isdigit, dtype)) or 8)
                held += math.prod(shapes[key]) * (1 if "F" in dtype else bits)
    return shapes, held


def _check_sizes(
    where: str, shapes: dict[str, list[int]], held: int, config: PreTrainedConfig, auto: Any, trust_remote_code: bool
) -> None:
    """Raise LoadError where the config asks for far more weights than are stored, before anything is allocated.

    transformers allocates what the config says and compares afterwards. What is left to it is bounded by the files;
    a model may compute a few of its weights, such as sinusoidal positions, and a new head is small.

    shapes, held   of the stored tensors, as `_stored` returns them
    """
    with unreadable(where), torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    asked = sum(map(math.prod, wanted.values()))
    if asked <= 1.25 * held + _MADE:
        return
    found = f"a config of {asked:,} weights, and files of {held:,}"
    other = next((name for name, shape in wanted.items() if list(shape) != shapes.get(name, list(shape))), None)
    if other is not None:
        found += f"; {other} is {list(wanted[other])} in the config, {shapes[other]} in the file"
    rule, fix = (
        "the files must hold the weights that the config asks for",
        "use the config.json saved with these weights",
    )
    raise LoadError(where, found=found, rule=rule, fix=fix)


def _check_complete(name: str | Path, model: PreTrainedModel, info: dict[str, Any], *, new_head: bool) -> None:
    where, rule = f"model {name}", "the checkpoint must contain every weight except those of a new head"
    new = tuple(f"{path}." for path in heads(model)) if new_head else ()
    if info["mismatched_keys"]:
        key, stored, wanted = sorted(info["mismatched_keys"])[0]
        found = f"{key} stored as {list(stored)}, the model has {list(wanted)}"
        fix = f"pass num_labels={stored[0]}" if key.startswith(new) else "use the config.json saved with these weights"
        raise LoadError(where, found=found, rule=rule, fix=fix)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(new))
    if missing:
        found = f"{len(missing)} weights of {type(model).__name__} not stored, first {missing[0]}"
        fix = "load a complete checkpoint of this architecture, or pass the task kind that it was made for"
        raise LoadError(where, found=found, rule=rule, fix=fix)


def _set_padding(name: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = range(next(model.get_input_embeddings().parameters()).shape[0])
    if tokenizer.pad_token_id not in rows:  # none, or one that was added without an embedding
        if tokenizer.eos_token_id not in rows:
            found, rule = "no padding or end token with an embedding", "batches need a padding token"
            raise LoadError(f"tokenizer of {name}", found=found, rule=rule, fix="set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        keep_end_ids(model, tokenizer)


@contextmanager
def _held_report() -> Iterator[list[logging.LogRecord]]:
    """Hold back transformers' table of missing and unexpected weights, which are checked by name here."""
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()
        if report:
            held.append(record)
        return not report

    logger.addFilter(keep)
    try:
        yield held
    finally:
        logger.removeFilter(keep)
