"""An expert, or a merged task vector, as what it was made from: an adapter or checkpoint that needs no expert file.

origin.initial   what is written
chain            a Dovetail adapter directory: `dovetail.load_adapter`
peft             a peft adapter directory: stock peft loads it
base             a Hugging Face checkpoint: stock transformers loads it
zero             task_vector.safetensors, the tensors alone
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dovetail.chains.layer.elastic import load_ranks
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.notation import chain
from dovetail.chains.stages import stages
from dovetail.checkpoint.adapter import Before, put_chain, save_adapter
from dovetail.checkpoint.formats.peft.write import write_adapter
from dovetail.checkpoint.load import load_tokenizer
from dovetail.errors import ChainError, LoadError
from dovetail.experts.bases import base_of
from dovetail.experts.expert import Expert
from dovetail.experts.live.activate import borrowed, put
from dovetail.experts.live.origins import adapter_file, check_fingerprint
from dovetail.experts.peft_initial import peft_initial
from dovetail.experts.vectors import Origin, TaskVector
from dovetail.models.fingerprint import model_fingerprint

TENSORS = "task_vector.safetensors"


def unpack(source: Expert | TaskVector, directory: str | Path, base: nn.Module | str | Path | None = None) -> Path:
    """Writes θ_init + τ into a directory, made if need be.

    base     the model, or where `dovetail.load` finds it. Needed for "chain" and "base", and for "peft" where DoRA or
             saved modules start from its weights. For a chain that calibrates, or has merged a stage: a model
             that carries this very chain, since an expert doesn't hold its masks and bases. It is as it was afterwards
    returns  the directory
    errors   LoadError for another base or a missing one; ChainError for a chain that can't be made again from the base
    """
    directory, origin = Path(directory), source.origin
    vector: Mapping[str, Tensor] = source.dense() if isinstance(source, Expert) else source
    if origin.initial == "zero":
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f".{TENSORS}.part"
        save_file({name: tensor.contiguous() for name, tensor in vector.items()}, part)
        os.replace(part, directory / TENSORS)
        return directory
    if origin.initial == "peft":
        model = base_of(source, base)[0] if isinstance(base, str | Path) else base
        _unpack_peft(vector, origin, directory, model)
        return directory
    if base is None:
        rule = f"it is added to {'the base' if origin.initial == 'base' else 'what its chain on the base starts with'}"
        raise LoadError("unpack", found="no base", rule=rule, fix="base=model, or where it is (--base)")
    model = base if isinstance(base, nn.Module) else base_of(source, base)[0]
    if origin.initial == "chain":
        before = Before(model)
        with borrowed(model):
            try:
                _unpack_chain(vector, origin, directory, model)
            finally:
                before.put_back()
        return directory
    if not isinstance(model, PreTrainedModel):
        raise LoadError("unpack", found=type(model).__name__, rule="a checkpoint is of a transformers model")
    _unpack_checkpoint(vector, origin, directory, model)
    if not isinstance(base, nn.Module):
        load_tokenizer(base).save_pretrained(directory)
    return directory


def _unpack_peft(vector: Mapping[str, Tensor], origin: Origin, directory: Path, model: nn.Module | None) -> None:
    config = dict(origin.peft or {})
    if config.get("save_projection"):
        config["save_projection"] = False  # stock peft draws them again from projection_prng_key
    initial = peft_initial(config, {name: tuple(tensor.shape) for name, tensor in vector.items()}, model)
    tensors = {n: t + initial[n].to(t.dtype) if n in initial else t for n, t in vector.items()}
    write_adapter(directory, config, tensors)


def _unpack_chain(vector: Mapping[str, Tensor], origin: Origin, directory: Path, model: nn.Module) -> None:
    begin_chain(model, origin)
    put(model, vector, origin)
    save_adapter(model, directory)


def ready(model: nn.Module, source: Expert | TaskVector) -> nn.Module:
    """A model that such an expert can be put on: the base under its chain, under its peft adapter, or by itself.

    model    the untouched base; it is changed in place
    returns  the model; peft's own around it for a peft adapter, which must be installed then
    """
    if source.origin.initial == "chain":
        begin_chain(model, source.origin)
    elif source.origin.initial == "peft":
        from peft import PeftModel

        with TemporaryDirectory() as folder:
            return PeftModel.from_pretrained(model, unpack(source, folder, model))
    return model


def begin_chain(model: nn.Module, origin: Origin) -> None:
    """Puts the expert's chain on its untouched base, with initial values; a model that carries it is checked."""
    file = adapter_file(origin)
    if file is None:
        rule = 'what starts as "chain" says of which adapter it is'
        raise LoadError("expert", found="no adapter", rule=rule, fix="pack the adapter again")
    links = chain(file.chain)
    fitted = [str(link) for link in stages(links)[0].applied if link.calibrated]
    fresh = not chain_layers(model)
    if fresh and (fitted or file.stage):
        raise ChainError(
            f"{file.chain} from an expert",
            found=f"{fitted[0]}, fitted to data" if fitted else f"stage {file.stage + 1}, on bases that were trained",
            rule="an expert holds what training changed, not masks and bases",
            fix="base= a model that carries this chain: the base with an adapter of it loaded (--adapter)",
        )
    put_chain(model, file, {}, "expert")
    if fresh:
        load_ranks(model, file.ranks, file.extracted)


def _unpack_checkpoint(vector: Mapping[str, Tensor], origin: Origin, directory: Path, model: PreTrainedModel) -> None:
    if origin.base is not None:
        check_fingerprint(model_fingerprint(model), origin.base)
    state: dict[str, Tensor] = model.state_dict()
    names: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in state.items():
        names.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    for name, change in vector.items():
        if name not in state or state[name].shape != change.shape:
            raise LoadError(f"expert at {name}", found="no such tensor in the base", rule="both have the same tensors")
        start = state[name]
        tuned = (start.float() + change.float()).to(start.dtype) if start.dtype.itemsize < 8 else start + change
        for other in names[start.data_ptr(), start.shape] if start.numel() else [name]:  # tied weights
            state[other] = tuned
    model.save_pretrained(directory, state_dict=state)
