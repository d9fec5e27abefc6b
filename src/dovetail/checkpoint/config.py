"""What is known of a model before its weights are read: configuration, tokenizer, held grid, and the empty model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch

from dovetail.chains.layer.held import held
from dovetail.chains.link import Chain, Link, Quantizer
from dovetail.chains.notation import chain
from dovetail.checkpoint.formats.contract import Format
from dovetail.checkpoint.formats.gguf import checked_header, gguf_config, gguf_tokenizer, keep_note, kept_tensors
from dovetail.checkpoint.formats.kept import folder_note, forget_format, format_of
from dovetail.checkpoint.packed import PACKED
from dovetail.errors import DovetailError, LoadError
from dovetail.files import read_json
from dovetail.models.dtypes import FLOATS
from dovetail.models.locate import ask_hub, resolve
from dovetail.tasks.task import FIELDS, HEAD_KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INDEX_NBYTES = 1 << 28
"""The limit of the file that names the shard of each tensor."""
CONFIG_NBYTES = 1 << 24
"""The limit of config.json, which may name thousands of labels."""
_MOST = {"layers": 1000, "_layer": 1000, "num_labels": 1_000_000}
"""End of a key of a config -> the largest number: the deepest language models have about a hundred layers."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


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
        with unreadable(f"model {name_or_dir}"):
            config = gguf_config(header)
        _check_counts(f"model {name_or_dir}", config.to_dict())
        if grid == "keep":
            empty = empty_model(config)
            with unreadable(f"model {name_or_dir}"):
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
    with unreadable(f"model {name_or_dir}, config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    where = f"model {name_or_dir}"
    if grid == "keep" and isinstance(source, Path) and (form := folder_format(where, source, config)) is not None:
        forget_format(config)
        config.dovetail = folder_note(where, source, weight_files(source), form, empty_model(config))
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


def load_tokenizer(name_or_dir: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer only, as it is stored. Raises LoadError."""
    from transformers import AutoTokenizer

    source = resolve(name_or_dir)
    if isinstance(source, Path) and source.is_file():
        header = checked_header(source)
        with unreadable(f"tokenizer of {name_or_dir}"):
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
    config, auto = for_task(config, task_kind, num_labels)
    with unreadable(f"model of type {config.model_type}"), torch.device("meta"):
        made = checked_dtype(dtype) or config.dtype or torch.float32
        model = auto.from_config(config, dtype=made, trust_remote_code=trust_remote_code).eval()
        _place_quantizer(model)
    return model


def best_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU where it has none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


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


def for_task(config: PreTrainedConfig, task_kind: str, num_labels: int | None) -> tuple[PreTrainedConfig, Any]:
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


def checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch.dtype of a key of FLOATS; None stays. Raises LoadError for another dtype."""
    known = FLOATS.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and known not in FLOATS.values():
        rule = "the dtype must be one of " + ", ".join(FLOATS)
        raise LoadError(f"dtype {dtype}", found=str(dtype), rule=rule, fix="pass one of these dtypes")
    return known


def folder_format(where: str, source: str | Path, config: PreTrainedConfig) -> Format | None:
    """Return the format of a quantized folder; None for other models. Raises LoadError."""
    if not isinstance(source, Path) or source.is_file() or (source / PACKED).is_file():
        return None
    return format_of(where, getattr(config, "quantization_config", None))


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


class _Index(pydantic.BaseModel):
    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
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


def _check_counts(where: str, said: Mapping[str, Any]) -> None:
    """Raise LoadError for a number of layers or labels for which making the model alone would not end."""
    for key, value in said.items():
        if isinstance(value, Mapping):
            _check_counts(where, value)
        most = next((most for end, most in _MOST.items() if str(key).endswith(end)), None)
        if most is not None and isinstance(value, int) and value > most:
            rule, fix = f"{key} must be at most {most:,}", "use the config.json saved with the weights"
            raise LoadError(where, found=f"{key}={str(value)[:30]}", rule=rule, fix=fix)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextmanager
def unreadable(where: str) -> Iterator[None]:
    """Raise a LoadError in place of any error of transformers, safetensors or a missing package."""
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
