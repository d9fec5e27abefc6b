"""Conversion of an expert or a merged task vector back to an adapter or a checkpoint.

origin.initial   output
chain            a Dovetail adapter directory: `dovetail.load_adapter`
peft             a peft adapter directory: stock peft loads it
base             a Hugging Face checkpoint: stock transformers loads it
zero             task_vector.safetensors, only the tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dovetail.chains.check import check
from dovetail.chains.layer.applied import carries_chain
from dovetail.chains.layer.elastic import load_ranks
from dovetail.chains.layer.held import held
from dovetail.checkpoint.adapter import Before, put_chain, save_adapter
from dovetail.checkpoint.config import load_tokenizer
from dovetail.checkpoint.formats.peft.write import write_adapter
from dovetail.errors import ChainError, LoadError
from dovetail.experts.expert import Expert
from dovetail.experts.live.activate import borrowed, put
from dovetail.experts.live.placement import adapter_file, check_fingerprint
from dovetail.experts.peft_adapters import needs_base, peft_initial
from dovetail.experts.sources import base_of
from dovetail.experts.vectors import Origin, TaskVector
from dovetail.files import atomic
from dovetail.models.fingerprint import model_fingerprint

TENSORS = "task_vector.safetensors"


def unpack(source: Expert | TaskVector, directory: str | Path, base: nn.Module | str | Path | None = None) -> Path:
    """Write θ_init + τ into a directory, which is created if needed.

    base     the model, or where `dovetail.load` finds it. Needed for "chain" and "base", and for "peft" if DoRA or
             saved modules start from its weights. For a chain that calibrates, or that has merged a stage, a model that
             carries the same chain, since an expert does not hold its masks and bases. The model stays unchanged
    returns  the directory
    errors   LoadError for another base or a missing one; ChainError for a chain that the base alone cannot reproduce
    """
    directory, origin = Path(directory), source.origin
    vector: Mapping[str, Tensor] = source.dense() if isinstance(source, Expert) else source
    if origin.initial == "zero":
        directory.mkdir(parents=True, exist_ok=True)
        with atomic(directory / TENSORS) as part:
            save_file({name: tensor.contiguous() for name, tensor in vector.items()}, part)
        return directory
    if origin.initial == "peft":
        model = base_of(source, base)[0] if isinstance(base, str | Path) else base
        _unpack_peft(vector, origin, directory, model)
        return directory
    if base is None:
        initial = "weights" if origin.initial == "base" else "chain's initial values"
        rule = f"the base is needed, since the expert is added to its {initial}"
        raise LoadError("unpack", found="no base", rule=rule, fix="pass base=MODEL (--base MODEL)")
    model = base if isinstance(base, nn.Module) else base_of(source, base)[0]
    if origin.initial == "chain":
        before = Before(model)
        with borrowed(model):
            try:
                begin_chain(model, origin)
                put(model, vector, origin)
                save_adapter(model, directory)
            finally:
                before.put_back()
        return directory
    if not isinstance(model, PreTrainedModel):
        rule, fix = "the base of a checkpoint must be a transformers model", "pass the name of the base"
        raise LoadError("unpack", found=type(model).__name__, rule=rule, fix=fix)
    _unpack_checkpoint(vector, origin, directory, model)
    if not isinstance(base, nn.Module):
        load_tokenizer(base).save_pretrained(directory)
    return directory


def _unpack_peft(vector: Mapping[str, Tensor], origin: Origin, directory: Path, model: nn.Module | None) -> None:
    config = dict(origin.peft or {})
    if config.get("save_projection"):
        config["save_projection"] = False  # stock peft draws the projections from projection_prng_key
    shapes = {name: tuple(tensor.shape) for name, tensor in vector.items()}
    if model is not None and origin.base is not None and needs_base(config, shapes):
        check_fingerprint(model_fingerprint(model), origin.base)
    initial = peft_initial(config, shapes, model)
    tensors = {n: t + initial[n].to(t.dtype) if n in initial else t for n, t in vector.items()}
    write_adapter(directory, config, tensors)


def ready(model: nn.Module, source: Expert | TaskVector) -> nn.Module:
    """Return a model that can carry the expert: the base with its chain, with its peft adapter, or by itself.

    model    the unmodified base; changed in place
    returns  the model; for a peft adapter, the model of peft around it (peft must be installed)
    """
    if source.origin.initial == "chain":
        begin_chain(model, source.origin)
    elif source.origin.initial == "peft":
        from peft import PeftModel

        with TemporaryDirectory() as folder:
            return PeftModel.from_pretrained(model, unpack(source, folder, model))
    return model


def begin_chain(model: nn.Module, origin: Origin) -> None:
    """Put the expert's chain with initial values on the unmodified base, or check a model that carries it."""
    file = adapter_file(origin)
    if file is None:
        rule = 'an expert with initial="chain" must hold its adapter.json'
        raise LoadError("expert", found="no adapter", rule=rule, fix="pack the adapter again")
    fitted = [str(link) for link in check(file.chain, held(model)).stages[0].applied if link.statistics]
    fresh = not carries_chain(model)
    if fresh and (fitted or file.stage):
        raise ChainError(
            f"{file.chain} from an expert",
            found=f"{fitted[0]}, fitted to data" if fitted else f"stage {file.stage + 1}, on trained bases",
            rule="the base must carry the chain, since an expert does not hold masks and bases",
            fix="load an adapter of the chain on the base first (--adapter ADAPTER)",
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
            rule, fix = "the base must contain every tensor of the expert", "pass the base of the expert"
            raise LoadError(f"expert at {name}", found="no such tensor in the base", rule=rule, fix=fix)
        start = state[name]
        tuned = (start.float() + change.float()).to(start.dtype) if start.dtype.itemsize < 8 else start + change
        for other in names[start.data_ptr(), start.shape] if start.numel() else [name]:  # tied weights
            state[other] = tuned
    model.save_pretrained(directory, state_dict=state)
