"""The two files of a saved adapter (`dovetail.adapter`), read without trusting them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dovetail.errors import LoadError

JSON_NBYTES = 1 << 20
"""The most that adapter.json may hold."""
_KEY = re.compile(r"link/[^/]+/\d+/\w+|base/[^/]+/[\w.]+|(mask|head)/[^/]+")


class AdapterFile(pydantic.BaseModel, extra="forbid"):
    """What adapter.json holds.

    base_fingerprint   of the whole model before the chain
    chain_fingerprint  of the bases that the links sit on: after pruning, quantizing and merging earlier stages
    quantizer          identity of the base's grid, or its dtype
    dtype              of the weights: another one than the base was loaded in, where training rounded it (bf16)
    ranks              LAYER/PLACE -> the rank that an elastic adapter runs at
    extracted          whether elastic adapters were made plain ones of those ranks
    """

    format: Literal["dovetail-adapter"] = "dovetail-adapter"
    version: Literal[1] = 1
    chain: str
    targets: str | list[str]
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**64)]
    stage: Annotated[int, pydantic.Field(ge=0)]
    base_fingerprint: str
    chain_fingerprint: str
    quantizer: str
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    ranks: dict[str, int] = {}
    extracted: bool = False


def read_json(path: Path) -> AdapterFile:
    """What adapter.json says. Raises LoadError."""
    where = str(path)
    try:
        if path.stat().st_size > JSON_NBYTES:
            raise LoadError(where, found=f"{path.stat().st_size} bytes", rule=f"at most {JSON_NBYTES}")
        return parse_json(where, path.read_bytes())
    except OSError as error:
        raise LoadError(
            where, found=error.strerror or str(error), rule="an adapter directory holds adapter.json"
        ) from None


def parse_json(where: str, text: bytes | str) -> AdapterFile:
    """What the text of an adapter.json says. Raises LoadError."""
    try:
        return AdapterFile.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise LoadError(where, found=f"{place}: {first['msg']}", rule="adapter.json as Dovetail writes it") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of adapter.safetensors, by keys of the known forms. Raises LoadError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise LoadError(
            str(path),
            found=str(error),
            rule="an adapter directory holds a whole adapter.safetensors",
            fix="copy the directory again",
        ) from None
    for key in tensors:
        if not _KEY.fullmatch(key):
            raise LoadError(str(path), found=f"a tensor {key[:80]!r}", rule="link/…, mask/…, base/… and head/… tensors")
    return tensors
