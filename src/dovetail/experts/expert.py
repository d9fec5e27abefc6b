"""Task experts: task vectors, compressed to the signs of their largest values and one scale (ComPEFT).

`compress` makes an expert, `load` reads one, and `Expert.dense` returns its values. In memory an expert stays
compressed, as in its file: a fiftieth of a bf16 task vector at density 0.05.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from dovetail.errors import DataError, LoadError
from dovetail.experts import file, ternary
from dovetail.experts.codec.codec import Coded, code, decode_dense, decode_indices, decode_masks, word_count
from dovetail.experts.masks import Masks, compare
from dovetail.experts.vectors import Origin, groups_of, origin_of, specs_of
from dovetail.files import writing


@dataclass(frozen=True)
class Expert:
    """A compressed task vector.

    header  the header of its file (`file.Header`)
    coded   the compressed tensors by name
    """

    header: file.Header
    coded: dict[str, Coded]

    def __repr__(self) -> str:
        kept = f"{len(self.coded)} tensors, {self.kept:,} of {self.numel:,} values kept"
        return f"Expert({kept}, density={self.density:g}, alpha={self.alpha:g}, {self.origin})"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: coded.shape for name, coded in self.coded.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of the tensors before compression."""
        return {entry.name: getattr(torch, entry.dtype) for entry in self.header.tensors}

    @property
    def scales(self) -> dict[str, float]:
        """Scale of each tensor: alpha times the standard deviation."""
        scales = self.header.scales
        return {name: scales[0 if self.header.scale == "vector" else at] for at, name in enumerate(self.coded)}

    @property
    def origin(self) -> Origin:
        """Origin of the task vector."""
        said = self.header
        return Origin(said.initial, said.base, said.chain, said.adapter, said.peft)

    @property
    def alpha(self) -> float:
        return self.header.alpha

    @property
    def density(self) -> float:
        """Requested share of values to keep. `kept` over `numel` is smaller where values were zero."""
        return self.header.density

    @property
    def numel(self) -> int:
        return sum(coded.numel for coded in self.coded.values())

    @property
    def kept(self) -> int:
        """Number of nonzero values."""
        return sum(coded.kept for coded in self.coded.values())

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        directory = b"".join(coded.directory.tobytes() for coded in self.coded.values())
        blocks = sum(len(coded.blocks) for coded in self.coded.values())
        return len(file.header_bytes(self.header, directory, blocks)) + len(directory) + blocks

    def save(self, path: str | Path) -> Path:
        """Write the file atomically and create its folder if needed; DovetailError if it cannot be written."""
        path = Path(path).absolute()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file.write(path, self.header, list(self.coded.values()))
        return path

    def dense(
        self,
        dtype: torch.dtype | None = None,
        *,
        into: Mapping[str, Tensor] | None = None,
        threads: int | None = None,
    ) -> dict[str, Tensor]:
        """Return the task vector: scale times sign where a value was kept, 0 elsewhere.

        dtype    of all tensors; None: the original dtype of each
        into     tensors to write to, by name, of the same shapes. They take precedence over `dtype`. A tensor that is
                 not contiguous or not on the CPU is decoded to a buffer and copied
        threads  None: torch's number of threads
        returns  tensors by name, those of `into` if given
        errors   LoadError for changed bytes, and for a tensor that `into` lacks or has in another shape
        """
        result, scales, dtypes = {}, self.scales, self.dtypes
        for name, coded in self.coded.items():
            if into is None:
                out = held = torch.empty(coded.shape, dtype=dtype or dtypes[name])
            else:
                out = _given(into, name, coded.shape)
                direct = out.is_contiguous() and out.device.type == "cpu"
                held = out.detach() if direct else torch.empty(coded.shape, dtype=out.dtype)
            decode_dense(coded, held, scales[name], name, threads or torch.get_num_threads())
            if held.data_ptr() != out.data_ptr() or held.device != out.device:
                with torch.no_grad():
                    out.copy_(held)
            result[name] = out
        return result

    def indices(self, name: str) -> tuple[Tensor, Tensor]:
        """Return row-major positions (int64, rising) of the nonzero values of a tensor, and their signs (int8)."""
        if name not in self.coded:
            rule = f"the name must be one of {', '.join(self.coded)[:300]}"
            raise LoadError(f"expert at {name}", found="no such tensor", rule=rule)
        at, signs = decode_indices(self.coded[name], name)
        return torch.from_numpy(at), torch.from_numpy(signs)

    def masks(self, *, threads: int | None = None) -> Masks:
        """Return two bits per value, for arithmetic without decoding (`dovetail.experts.masks`)."""
        words = sum(word_count(coded.numel) for coded in self.coded.values())
        masks = Masks(np.empty((2, words), np.uint64), self.shapes, self.scales)
        for name, first, _ in masks.spans():
            decode_masks(self.coded[name], masks.words, first, name, threads or torch.get_num_threads())
        return masks

    def with_alpha(self, alpha: float) -> Expert:
        """Return an expert with the same signs and scales of another alpha. It shares the compressed bytes."""
        _check_alpha(alpha)
        scales = tuple(scale / self.alpha * alpha for scale in self.header.scales)
        return replace(self, header=self.header.model_copy(update={"alpha": float(alpha), "scales": scales}))

    def check_base(self, base: nn.Module | str) -> None:
        """Raise LoadError unless the expert was made for this model, or for a model with this fingerprint."""
        found = _fingerprint(base)
        if self.header.base is None:
            rule = "the expert must name the base that it is for"
            raise LoadError("expert", found="no base", rule=rule, fix="compress it again with base=model")
        check_same_base(found, self.header.base)


def compress(
    task_vector: Mapping[str, Tensor],
    density: float,
    alpha: float = 1.0,
    scale: Literal["vector", "tensor"] = "vector",
    *,
    base: nn.Module | str | None = None,
    origin: Origin | None = None,
    provenance: dict[str, pydantic.JsonValue] | None = None,
) -> Expert:
    """Compress a task vector to the signs of its largest values and a scale (`ternary`; ComPEFT, Algorithm 1).

    task_vector  fine-tuned minus initial parameters, by name; float64, float32, float16 or bfloat16, any shapes
    density      share of all values to keep, 0..1: round(density · n), counted over all tensors together
    alpha        scale = alpha · standard deviation. 1 suffices for bases of 13B and more at densities up to 0.2. For
                 smaller bases choose it on a validation set, from 0.5 to 10 (§4.2); `Expert.with_alpha` costs nothing
    scale        "vector": one standard deviation, of all values; "tensor": one for each tensor. The base's own tensors
                 among an adapter's parameters, such as a head, are counted and scaled one by one in both cases
    base         the base model, or its fingerprint; None: as in the origin
    origin       origin of the task vector; None: that of a `TaskVector`, or initial values of zero
    provenance   further facts to store in the file
    errors       DataError for NaN, infinity, another dtype, density or alpha out of range
    """
    check_density("compress", density)
    if scale not in ("vector", "tensor"):
        raise DataError("compress", found=f"scale={scale!r}", rule='scale must be "vector" or "tensor"')
    _check_alpha(alpha)
    specs, origin = specs_of(task_vector), origin or origin_of(task_vector)
    groups = groups_of(specs, origin)
    found, spread_of = {}, {}
    for names in groups:
        part = task_vector if len(groups) == 1 else {name: task_vector[name] for name in names}
        selection = ternary.top_k(part, density, per_tensor=scale == "tensor")
        spread_of |= selection.spreads if scale == "tensor" else dict.fromkeys(names, selection.spread)
        found |= {name: code(selection.masks.pop(name), specs[name].shape) for name in names}
    coded = {name: found[name] for name in specs}
    scale = scale if len(groups) == 1 else "tensor"
    spreads = [spread_of[name] for name in specs] if scale == "tensor" else [selection.spread]
    dtypes = {name: spec.dtype for name, spec in specs.items()}
    if base is not None:
        origin = replace(origin, base=_fingerprint(base))
    scales = [alpha * spread for spread in spreads]
    return assemble(coded, dtypes, scale, scales, density, alpha, origin, provenance or {})


def from_masks(masks: Masks, like: Expert, *, provenance: dict[str, pydantic.JsonValue] | None = None) -> Expert:
    """Return an expert of the ternary values in masks, with base, chain and dtypes of the expert `like`."""
    coded = {}
    for name, first, last in masks.spans():
        coded[name] = code(np.ascontiguousarray(masks.words[:, first:last]), masks.shapes[name])
    dtypes = {name: like.dtypes[name] for name in coded}
    density = masks.kept / masks.numel if masks.numel else 0.0
    scales = [masks.scales[name] for name in coded]
    return assemble(coded, dtypes, "tensor", scales, density, 1.0, like.origin, provenance or {})


def load(path: str | Path, *, base: nn.Module | str | None = None, tensors: Sequence[str] | None = None) -> Expert:
    """Read an expert. It stays compressed until its values are requested.

    base     the model that it must be for, or its fingerprint
    tensors  names to read, without the blocks of the others; None: all
    errors   LoadError for an incomplete file, for a file that is no expert, and for another base
    """
    header, coded = file.read(Path(path), tensors)
    expert = Expert(header, coded)
    if base is not None:
        expert.check_base(base)
    return expert


def similarity(a: Expert | Masks, b: Expert | Masks) -> dict[str, float]:
    """Compare two experts with the same tensors, on their masks.

    returns  dot, cosine: of the decoded vectors, scales included (cosine 0 if one is zero)
             hamming: number of values with different signs of -1, 0, 1
             sign_agreement: share of equal signs among the values that both keep (0 if there are none)
             kept_a, kept_b, kept_both, numel: numbers of values
    errors   DataError for experts of different tensors
    """
    return compare(a.masks() if isinstance(a, Expert) else a, b.masks() if isinstance(b, Expert) else b)


def verify(expert: Expert, *, threads: int | None = None) -> None:
    """Raise LoadError unless every block has its CRC-32C and decodes.

    This costs less than decoding: two bits per value are written, each tensor over the one before.

    threads  None: torch's number of threads
    """
    most = max((word_count(coded.numel) for coded in expert.coded.values()), default=0)
    scratch = np.empty((2, most), np.uint64)
    for name, coded in expert.coded.items():
        decode_masks(coded, scratch, 0, name, threads or torch.get_num_threads())


def assemble(
    coded: dict[str, Coded],
    dtypes: Mapping[str, torch.dtype],
    scale: Literal["vector", "tensor"],
    scales: Sequence[float],
    density: float,
    alpha: float,
    origin: Origin,
    provenance: dict[str, pydantic.JsonValue],
) -> Expert:
    """Return an expert of coded tensors. DataError if its header cannot be written."""
    entries = [
        {"name": name, "shape": each.shape, "dtype": str(dtypes[name]).removeprefix("torch."), "order": each.order}
        for name, each in coded.items()
    ]
    said = asdict(origin) | {"tensors": entries, "scale": scale, "scales": list(scales), "provenance": provenance}
    said |= {"density": float(density), "alpha": float(alpha)}
    try:
        header = file.Header.model_validate_json(json.dumps(said, allow_nan=False))
    except (pydantic.ValidationError, ValueError, TypeError) as error:
        found = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else str(error)
        rule = "the header must hold finite numbers, JSON and names of at most 500 characters"
        raise DataError("compress", found=found[:300], rule=rule) from None
    return Expert(header, coded)


def _given(into: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    out = into.get(name)
    if out is None or tuple(out.shape) != shape or not out.dtype.is_floating_point or out.dtype.itemsize < 2:
        found = "nothing" if out is None else f"{list(out.shape)}, {out.dtype}"
        rule = f"a buffer must be a float tensor of shape {list(shape)}"
        raise LoadError(f"buffer for {name}", found=found, rule=rule, fix="pass one of torch.zeros(shape)")
    return out


def _fingerprint(base: nn.Module | str) -> str:
    if isinstance(base, str):
        return base
    from dovetail.models.fingerprint import model_fingerprint  # imports transformers, which takes seconds

    return model_fingerprint(base)


def _check_alpha(alpha: float) -> None:
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
        raise DataError("alpha", found=str(alpha), rule="alpha must be a finite number above 0")


def check_density(where: str, density: float) -> None:
    """Raise DataError for a density out of range."""
    if not (isinstance(density, (int, float)) and 0 <= density <= 1):
        raise DataError(where, found=f"density={density}", rule="density must be from 0 to 1", fix="pass density=0.2")


def check_same_base(found: str, expected: str) -> None:
    """Raise LoadError unless both are the same fingerprint."""
    if found != expected:
        found, rule = f"a base with fingerprint {found}", f"the base must have the expert's fingerprint, {expected}"
        fix = "load the checkpoint and the dtype that the expert was trained on"
        raise LoadError("expert", found=found, rule=rule, fix=fix)
