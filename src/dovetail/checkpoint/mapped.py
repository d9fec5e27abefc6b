"""Stock checkpoints loaded with weights that stay on disk (`dovetail.models.disk`).

Most tensors of a checkpoint are those of the model, and become views of its files. Those that transformers converts
(the experts of a mixture, which become one tensor) or that are cast are written to files of their own, block by block.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.models.disk import Disk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_mapped(
    disk: Disk, files: Sequence[Path], config: PreTrainedConfig, auto: Any, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint with weights that stay on disk, as `from_pretrained` would.

    files    the safetensors files with the weights
    auto     the auto class that makes the model
    dtype    of the weights
    returns  the model, in eval mode, and transformers' names of missing, unexpected and mismatched tensors
    """
    from accelerate import init_empty_weights
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
    )
    from transformers.modeling_utils import LoadStateDictConfig

    with init_empty_weights(include_buffers=False):  # buffers that are not stored are made from the config
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    mapping: Any = get_model_conversion_mapping(model)
    plan = LoadStateDictConfig(dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    missing, unexpected, mismatched = set(model.state_dict()), set[str](), set[Any]()

    def fill(part: dict[str, Tensor]) -> set[str]:
        """Put tensors in their places, and return the names of those that they became."""
        info, _ = convert_and_load_state_dict_in_model(model, part, plan)
        filled = set(model.state_dict()) - info.missing_keys
        missing.difference_update(filled)
        unexpected.update(info.unexpected_keys)
        mismatched.update(info.mismatched_keys)
        return filled

    wanted = model.state_dict()
    as_stored: dict[str, Tensor] = {}
    changed: dict[str, dict[str, Tensor]] = {}
    for path in files:
        for key, tensor in disk.map(path).items():
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
            if pattern is None and (name not in wanted or wanted[name].dtype == tensor.dtype):
                as_stored[key] = tensor
            else:
                changed.setdefault(_block(name), {})[key] = tensor
    fill(as_stored)
    for block, part in changed.items():
        filled = fill(part)
        file = f"model-{hashlib.sha256(block.encode()).hexdigest()[:8]}-{block}"[:200]
        state = model.state_dict()
        for name, tensor in disk.store(file, {name: state[name] for name in sorted(filled)}).items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if leaf in module._parameters:
                tensor = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            setattr(module, leaf, tensor)
        disk.drop()
    used: Any = [entry for entry in mapping if entry.was_used()]
    model._weight_conversions = used
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    missing = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta}
    return model.eval(), {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}


def _block(name: str) -> str:
    """Return the path of the block that a tensor belongs to, by the first number in its name; "" for none."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""
