"""The record, on disk, of the blocks that a link has compressed: a stopped compression continues behind the last one.

A finished block is one file with the bases of its layers. Its weights are read from that file from then on, so that
the memory that they took is free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dovetail.chains.layer.base import Base
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.link import Quantizer
from dovetail.chains.notation import chain
from dovetail.errors import LoadError
from dovetail.files import open_tensors, read_json, write_whole
from dovetail.models.disk import Disk

_START = "start.json"


def begin(disk: Disk, identity: Mapping[str, str]) -> None:
    """Note what a compression is of; raise LoadError where the folder holds the blocks of another one.

    identity  part -> its text or digest
    """
    path, fix = disk.folder / _START, f"remove {disk.folder}, or choose another output"
    if not path.exists():
        write_whole(path, json.dumps(dict(identity), indent=2))
        return
    rule = "a stopped compression must continue with the same model, chain, data and settings"
    before = read_json(path, dict[str, str], rule=rule, fix=fix)
    if other := next((name for name, text in identity.items() if before.get(name) != text), None):
        found = f"{other}: {identity[other]}; at the start {before.get(other)}"[:300]
        raise LoadError(f"compression in {disk.folder}", found=found, rule=rule, fix=fix)


def keep_on_disk(disk: Disk, file: str, bases: Mapping[str, Base]) -> None:
    """Write the bases of layers to one of the disk's own files, and read them from the file from now on."""
    identities = {name: None if base.quantized is None else base.identity for name, base in bases.items()}
    tensors = {f"{name}/{key}": tensor for name, base in bases.items() for key, tensor in base.state_dict().items()}
    tensors |= {f"{name}/start": base.start for name, base in bases.items() if base.start is not None}
    _put(bases, identities, disk.store(file, tensors, {"layers": json.dumps(identities)}))
    disk.drop()


def _put(bases: Mapping[str, Base], identities: Mapping[str, str | None], tensors: Mapping[str, Tensor]) -> None:
    states: dict[str, dict[str, Tensor]] = {name: {} for name in identities}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        states[name][part] = tensor
    for name, identity in identities.items():
        link = None if identity is None else chain(identity).links[0]
        assert link is None or isinstance(link, Quantizer)
        bases[name].place(link, states[name])


class Journal:
    """The finished blocks of the link at `place` in its stage, and of the links after it.

    touch  called with a layer's name before its base is put in place
    all_   keep the blocks of earlier links too, which later blocks are calibrated on where the inputs are the original
           ones
    """

    def __init__(
        self, disk: Disk, place: int, layers: Mapping[str, ChainLinear], touch: Callable[[str], object],
        *, all_: bool = False,
    ) -> None:  # fmt: skip
        self.disk, self.place, self._layers, self._touch, self._all = disk, place, layers, touch, all_
        self._files: dict[str, dict[int, str]] = {}
        for path in sorted(disk.folder.glob("link*-*.safetensors")):
            name = path.stem
            with open_tensors(path, owner="a stopped compression") as file:
                for layer in json.loads(file.metadata()["layers"]):
                    self._files.setdefault(layer, {})[int(name.removeprefix("link").partition("-")[0])] = name

    def finished(self, names: Sequence[str]) -> bool:
        """Return whether the link has compressed all these layers."""
        return all(any(place >= self.place for place in self._files.get(name, ())) for name in names)

    def restore(self, names: Sequence[str]) -> None:
        """Put the bases of finished layers in place; those of a later link, where the files of this one are gone."""
        files = {}
        for name in names:
            self._touch(name)
            own = self._files[name]
            files[own.get(self.place, own[max(own)])] = None
        for file in files:
            path = self.disk.path(file)
            with open_tensors(path, owner="a stopped compression") as opened:
                identities: dict[str, str | None] = json.loads(opened.metadata()["layers"])
            bases = {name: self._layers[name].base for name in identities}
            _put(bases, identities, self.disk.map(path, owner="a stopped compression"))

    def keep(self, block: str, names: Sequence[str]) -> None:
        """Write the bases of a block's layers, and read them from the file from now on."""
        file = f"link{self.place}-{block}"
        keep_on_disk(self.disk, file, {name: self._layers[name].base for name in names})
        old = set()
        for name in names:
            own = self._files.setdefault(name, {})
            if not self._all:
                old |= set(own.values())
                own.clear()
            own[self.place] = file
        for before in old - {name for own in self._files.values() for name in own.values()}:
            self.disk.remove(before)
