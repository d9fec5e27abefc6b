"""Models and tokenizers: a hub id, a folder, a GGUF file, "playground", or of an installed package; packed or stock.

Only safetensors and GGUF files are read, and no code of a checkpoint is run unless the caller allows it. The checkpoint
must contain every weight except those of a new head; transformers would warn and continue with random numbers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch

from dovetail.chains.layer.held import held, read_grids
from dovetail.chains.link import Chain, Link, Quantizer
from dovetail.chains.notation import chain
from dovetail.checkpoint.formats.contract import Format
from dovetail.checkpoint.formats.gguf import (
    checked_header,
    forget_gguf,
    gguf_config,
    gguf_tokenizer,
    keep_note,
    kept_tensors,
    load_kept,
    warn_of_unread,
)
from dovetail.checkpoint.formats.kept import folder_note, forget_format, format_of, load_kept_folder
from dovetail.checkpoint.mapped import load_mapped
from dovetail.checkpoint.packed import PACKED, load_packed
from dovetail.errors import DovetailError, LoadError
from dovetail.files import open_tensors, read_json
from dovetail.models.disk import Disk
from dovetail.models.dtypes import FLOATS
from dovetail.models.fingerprint import drop_stale_note
from dovetail.models.locate import ask_hub, resolve
from dovetail.models.targets import HEADS, heads
from dovetail.tasks.task import FIELDS, HEAD_KINDS
from dovetail.tasks.vocabulary import keep_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INDEX_NBYTES = 1 << 28
"""The limit of the file that names the shard of each tensor."""
CONFIG_NBYTES = 1 << 24
"""The limit of config.json, which may name thousands of labels."""
_MOST = {"layers": 1000, "_layer": 1000, "num_labels": 1_000_000}
"""End of a key of a config -> the largest number: the deepest language models have about a hundred layers."""
_MADE = 1 << 24
"""The most weights of a model that a checkpoint does not hold."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


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
    source, cast = resolve(name_or_dir), _dtype(dtype)
    _check_grid(name_or_dir, grid)
    config = load_config(name_or_dir, trust_remote_code=trust_remote_code)
    config, auto = _for_task(config, task_kind, num_labels)
    packed = isinstance(source, Path) and (source / PACKED).is_file()
    header = checked_header(source) if isinstance(source, Path) and source.is_file() else None
    gguf: dict[str, str] = {}
    if header is not None:
        _check_sizes(f"model {name_or_dir}", {}, header.weights, config, auto, trust_remote_code)
        warn_of_unread(header)
        gguf["gguf_file"] = str(header.path.absolute())
        source, cast = header.path.parent, cast or FLOATS[header.dtype]
    elif isinstance(source, Path) and not packed:
        _check_sizes(f"model {name_or_dir}", *_stored(_weight_files(source)), config, auto, trust_remote_code)
    tokenizer = load_tokenizer(name_or_dir, trust_remote_code=trust_remote_code)
    if disk is not None:
        if not isinstance(source, Path) or header is not None or packed or grid or task_kind in HEAD_KINDS:
            rule = "weights can stay on disk for a folder of a stock checkpoint, without a new head"
            raise LoadError(f"model {name_or_dir}", found="another kind of model", rule=rule, fix="leave disk out")
        model = _load_mapped(f"model {name_or_dir}", source, disk, config, auto, cast, trust_remote_code)
        _set_padding(name_or_dir, model, tokenizer)
        return model, tokenizer
    form = _format(f"model {name_or_dir}", source, config) if grid == "keep" and header is None and not packed else None
    if form is not None:
        where, files, made = f"model {name_or_dir}", _weight_files(Path(source)), cast or _dtype(config.dtype)
        with _unreadable(where), torch.random.fork_rng(devices=[]):
            model = load_kept_folder(where, Path(source), files, form, config, auto, made or torch.float32)
        _set_padding(name_or_dir, model, tokenizer)
        return model, tokenizer
    if header is not None and grid == "keep":
        with _unreadable(f"model {name_or_dir}"), torch.random.fork_rng(devices=[]):
            model = load_kept(header, config, auto, cast or torch.float32)
        _set_padding(name_or_dir, model, tokenizer)
        return model, tokenizer
    if packed:
        with _unreadable(f"model {name_or_dir}"), torch.random.fork_rng(devices=[]):
            model = load_packed(Path(source), config, auto, cast)
        _set_padding(name_or_dir, model, tokenizer)
        return model, tokenizer
    with _unreadable(f"model {name_or_dir}"), torch.random.fork_rng(devices=[]), _held_report() as reports:
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
    made = dtype or _dtype(config.dtype) or torch.float32
    with _unreadable(where), torch.random.fork_rng(devices=[]):
        model, info = load_mapped(disk, _weight_files(folder), config, auto, made, trust)
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
    _weight_files(folder)
    made: Any = type(model)
    with _unreadable(f"model {folder}"), torch.random.fork_rng(devices=[]), _held_report():
        loaded, info = made.from_pretrained(
            folder,
            config=copy.deepcopy(model.config),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return loaded, info


def load_config(
    name_or_dir: str | Path, *, trust_remote_code: bool = False, grid: Literal["keep"] | None = None
) -> PreTrainedConfig:
    """Load the model's configuration, found as `load` finds it; needs no weights. Raises LoadError.

    grid  as for `load`: with "keep", the configuration says which grid each layer has
    """
    from transformers import AutoConfig

    source = resolve(name_or_dir)
    if isinstance(source, str):
        ask_hub(source)
    elif source.is_file():
        header = checked_header(source)
        with _unreadable(f"model {name_or_dir}"):
            config = gguf_config(header)
        _check_counts(f"model {name_or_dir}", config.to_dict())
        if grid == "keep":
            empty = empty_model(config)
            with _unreadable(f"model {name_or_dir}"):
                config.dovetail = keep_note(header, kept_tensors(header, empty), empty)
        return config
    elif not (source / "config.json").is_file():
        found, fix = "no config.json in the folder", "name the folder that save_pretrained wrote"
        if (source / "adapter_config.json").is_file():
            found, fix = "an adapter, no model", "load the base model, then the adapter"
        elif files := sorted(source.glob("*.gguf")):
            fix = f"name the file, as in {name_or_dir}/{files[0].name}"
        rule = "a model's folder must contain config.json, *.safetensors and the tokenizer's files"
        raise LoadError(f"model {name_or_dir}", found=found, rule=rule, fix=fix)
    if isinstance(source, Path):
        rule, fix = "config.json must hold the configuration of a model", "copy the folder again"
        said = read_json(source / "config.json", dict[str, Any], rule=rule, fix=fix, limit=CONFIG_NBYTES)
        _check_counts(f"model {name_or_dir}, config.json", said)
    with _unreadable(f"model {name_or_dir}, config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    where = f"model {name_or_dir}"
    if grid == "keep" and isinstance(source, Path) and (form := _format(where, source, config)) is not None:
        forget_format(config)
        config.dovetail = folder_note(where, source, _weight_files(source), form, empty_model(config))
    return config


def held_in(name_or_dir: str | Path, grid: Literal["keep"] | None = None) -> tuple[Link, ...]:
    """Return the pruner and the quantizer of a merged model's folder (`dovetail.chains.layer.held`).

    Nothing is raised without `grid`, and nothing known of a model on the hub: `load` and `apply` find out.

    grid  as for `load`. Raises LoadError for a GGUF file that has no grid
    """
    if grid == "keep" and isinstance(path := resolve(name_or_dir), Path) and path.is_file():
        return held(load_config(name_or_dir, grid=grid))
    try:
        path = Path(resolve(name_or_dir)) / "config.json"
        said = read_json(path, dict[str, Any], rule="config.json must be a JSON object") if path.is_file() else {}
    except LoadError:
        return ()
    if grid == "keep" and "quantization_config" in said:
        return held(load_config(name_or_dir, grid=grid))
    return held(SimpleNamespace(dovetail=said.get("dovetail")))


def grid_of(*chains: str | Chain | Link) -> Literal["keep"] | None:
    """Return the `grid` with which `load` gives the model that these chains need: that of a chain with `keep`."""
    links = [link for text in chains if text for link in chain(text)]
    return "keep" if any(isinstance(link, Quantizer) and link.continues for link in links) else None


def _format(where: str, source: str | Path, config: PreTrainedConfig) -> Format | None:
    """Return the format of a quantized folder; None for other models. Raises LoadError."""
    if not isinstance(source, Path) or source.is_file() or (source / PACKED).is_file():
        return None
    return format_of(where, getattr(config, "quantization_config", None))


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


def load_tokenizer(name_or_dir: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer only, as it is stored. Raises LoadError."""
    from transformers import AutoTokenizer

    source = resolve(name_or_dir)
    if isinstance(source, Path) and source.is_file():
        header = checked_header(source)
        with _unreadable(f"tokenizer of {name_or_dir}"):
            return gguf_tokenizer(header, gguf_config(header).model_type)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception
        rule = "a model's folder must contain its tokenizer's files"
        fix = "save them with tokenizer.save_pretrained(folder)"
        raise LoadError(f"tokenizer of {name_or_dir}", found=_first_line(error), rule=rule, fix=fix) from error


def empty_model(
    config: PreTrainedConfig,
    *,
    task_kind: str = "generation",
    num_labels: int | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Make a model without storage (device "meta"), with the names, shapes, dtypes and ties that `load` gives.

    dtype None is the config's own, or float32 where it names none. `config` is not changed. Raises LoadError.
    """
    _check_counts(f"model of type {config.model_type}", config.to_dict())
    config, auto = _for_task(config, task_kind, num_labels)
    with _unreadable(f"model of type {config.model_type}"), torch.device("meta"):
        made = _dtype(dtype) or config.dtype or torch.float32
        model = auto.from_config(config, dtype=made, trust_remote_code=trust_remote_code).eval()
        _place_quantizer(model)
    return model


def _place_quantizer(model: PreTrainedModel) -> None:
    """Replace the layers that a quantized checkpoint stores in another form, as transformers does before it loads."""
    from transformers.quantizers import AutoHfQuantizer

    configs: Any = model.config, model.config.get_text_config(decoder=True)
    said = next((each.quantization_config for each in configs if "quantization_config" in vars(each)), None)
    if said is None or not AutoHfQuantizer.supports_quant_method(said):
        return
    quantizer = AutoHfQuantizer.from_config(said, pre_quantized=True)
    quantizer.validate_environment(device_map=None, weights_only=True)
    quantizer.preprocess_model(model, dtype=model.dtype, device_map=None, checkpoint_files=[], use_kernels=False)


def best_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU where it has none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


class _Index(pydantic.BaseModel):
    weight_map: dict[str, str]


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads; raise LoadError where one is missing, or of another kind."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    rule = "weights are read from safetensors only; nothing is unpickled"
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        found = f"only {', '.join(pickles)}" if pickles else "no model.safetensors"
        fix = "convert it with save_pretrained, which writes safetensors"
        raise LoadError(f"model {folder}", found=found, rule=rule, fix=fix)
    complete = "a checkpoint's index must name the file of each tensor under weight_map"
    shards = sorted(set(read_json(index, _Index, limit=INDEX_NBYTES, rule=complete).weight_map.values()))
    # transformers would hand a shard of another kind to torch.load.
    bad = [shard for shard in shards if Path(shard).suffix != ".safetensors" or not (folder / shard).is_file()]
    if bad:
        found = f"shards missing or of another kind: {', '.join(bad)}"
        raise LoadError(f"model {folder}", found=found, rule=rule, fix="copy the folder again")
    return [folder / shard for shard in shards]


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
    with _unreadable(where), torch.device("meta"):
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


def _check_counts(where: str, said: Mapping[str, Any]) -> None:
    """Raise LoadError for a number of layers or labels for which making the model alone would not end."""
    for key, value in said.items():
        if isinstance(value, Mapping):
            _check_counts(where, value)
        most = next((most for end, most in _MOST.items() if str(key).endswith(end)), None)
        if most is not None and isinstance(value, int) and value > most:
            rule, fix = f"{key} must be at most {most:,}", "use the config.json saved with the weights"
            raise LoadError(where, found=f"{key}={str(value)[:30]}", rule=rule, fix=fix)


def _for_task(config: PreTrainedConfig, task_kind: str, num_labels: int | None) -> tuple[PreTrainedConfig, Any]:
    """Return a copy of the config with the head of the task kind, and the auto class that makes the model."""
    where = f"task kind {task_kind}"
    if task_kind not in FIELDS:
        rule = "the kind must be one of " + ", ".join(FIELDS)
        raise LoadError(where, found=task_kind, rule=rule, fix="pass one of these kinds")
    if num_labels is not None and not (num_labels >= 2 if task_kind == "classification" else num_labels == 1):
        rule = "num_labels must be at least 2 for a classification and 1 for a regression; other kinds have none"
        raise LoadError(where, found=f"num_labels={num_labels}", rule=rule, fix="leave num_labels out")
    config = copy.deepcopy(config)
    if task_kind not in HEAD_KINDS:
        return config, auto_class(config, task_kind)
    config.problem_type = "regression" if task_kind == "regression" else "single_label_classification"
    labels = 1 if task_kind == "regression" else num_labels
    if labels is not None:
        config.num_labels = labels
    return config, auto_class(config, task_kind)


def auto_class(config: PreTrainedConfig, task_kind: str) -> Any:
    """Return the auto class of transformers that makes the model of a configuration for tasks of this kind.

    A model of images and texts that has no class for texts alone (Mistral 3, Qwen2.5-VL) is made whole.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )
    from transformers.models.auto import modeling_auto as known

    if task_kind in HEAD_KINDS:
        return AutoModelForSequenceClassification
    if config.model_type not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        config.model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


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


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    known = FLOATS.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and known not in FLOATS.values():
        rule = "the dtype must be one of " + ", ".join(FLOATS)
        raise LoadError(f"dtype {dtype}", found=str(dtype), rule=rule, fix="pass one of these dtypes")
    return known


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextmanager
def _unreadable(where: str) -> Iterator[None]:
    # A config or a file from outside can raise anything in transformers: a wrong type or number in config.json a
    # TypeError, IndexError, AssertionError or ZeroDivisionError, a truncated file a SafetensorError.
    try:
        yield
    except DovetailError:
        raise
    except ImportError as error:
        rule = "the package that the checkpoint needs must be installed"
        raise LoadError(where, found=_first_line(error), rule=rule, fix="install it, or load another copy") from error
    except Exception as error:
        rule = "the checkpoint must be complete and readable by transformers"
        raise LoadError(where, found=_first_line(error), rule=rule, fix="fetch or save it again") from error


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
