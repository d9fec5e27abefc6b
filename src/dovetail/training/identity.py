"""What makes a run the same run: the model, its chain, the records and the tokenizer, as digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dovetail.chains.layer.applied import applied, carries_chain
from dovetail.models.fingerprint import model_fingerprint, tensors_fingerprint
from dovetail.tasks.task import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def model_identity(model: nn.Module) -> dict[str, str]:
    """Return the base of a model and its chain, with the seed and the targets that it was applied with."""
    if not carries_chain(model):
        return {"chain": "none", "model": model_fingerprint(model)}
    record = applied(model)
    targets = record.targets if isinstance(record.targets, str) else ", ".join(record.targets)
    return {
        "chain": str(record.assignment),
        "model": record.base_fingerprint,
        "targets": targets,
        "seed of the chain": str(record.seed),
    }


def records_identity(splits: Mapping[str, Sequence[Record]]) -> str:
    """Return the digest of the records of a task's splits, in order."""
    return _digest(json.dumps([name, record], sort_keys=True) for name in splits for record in splits[name])


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of a tokenizer: its vocabulary and rules, its special tokens and its chat template."""
    some: Any = tokenizer
    rules = some.backend_tokenizer.to_str() if some.is_fast else json.dumps(some.get_vocab(), sort_keys=True)
    said = {name: str(token) for name, token in some.special_tokens_map.items()}
    return _digest(
        [rules, json.dumps(said, sort_keys=True), json.dumps(some.chat_template), str(some.model_max_length)]
    )


def batches_identity(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Return the digest of calibration batches."""
    return _digest(tensors_fingerprint(batch) for batch in batches)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first part of an identity that is not as it was before, with both values; "" where all are equal."""
    for name, value in now.items():
        if name not in before:
            return f"no record of the {name} at the start"
        if before[name] != value:
            digest = str(value).startswith("sha256:")
            return (
                f"another {name} than at the start"
                if digest
                else f"{name}={value}, but {name}={before[name]} at the start"
            )
    return ""


def _digest(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{len(part)} {part}".encode("utf-8", "surrogatepass"))
    return f"sha256:{found.hexdigest()}"
