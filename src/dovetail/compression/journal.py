"""The record, on disk, of the blocks that a link has compressed: a stopped compression continues behind the last one.

A finished block is one file with the bases of its layers. Its weights are read from that file from then on, so that
the memory that they took is free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

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


class Journal:
    """The finished blocks of the link at `place` in its stage, and of the links after it.

    touch  called with a layer's name before its base is put in place
    """

    def __init__(
        self, disk: Disk, place: int, layers: Mapping[str, ChainLinear], touch: Callable[[str], object]
    ) -> None:
        self.disk, self.place, self._layers, self._touch = disk, place, layers, touch
        self._files: dict[str, tuple[int, str]] = {}
        for path in sorted(disk.folder.glob("link*-*.safetensors")):
            name = path.stem
            with open_tensors(path, owner="a stopped compression") as file:
                for layer in json.loads(file.metadata()["layers"]):
                    if layer not in self._files or self._files[layer][0] < _place(name):
                        self._files[layer] = _place(name), name

    def finished(self, names: Sequence[str]) -> bool:
        """Return whether the link has compressed all these layers."""
        return all(name in self._files and self._files[name][0] >= self.place for name in names)

    def restore(self, names: Sequence[str]) -> None:
        """Put the bases of finished layers in place; those of a later link, where it has compressed them too."""
        for name in names:
            self._touch(name)
        for file in dict.fromkeys(self._files[name][1] for name in names):
            path = self.disk.path(file)
            with open_tensors(path, owner="a stopped compression") as opened:
                identities: dict[str, str | None] = json.loads(opened.metadata()["layers"])
            self._put(identities, self.disk.map(path, owner="a stopped compression"))

    def keep(self, block: str, names: Sequence[str]) -> None:
        """Write the bases of a block's layers, and read them from the file from now on."""
        file = f"link{self.place}-{block}"
        bases = {name: self._layers[name].base for name in names}
        identities = {name: None if b.quantized is None else b.identity for name, b in bases.items()}
        tensors = {f"{name}/{key}": t for name, base in bases.items() for key, t in base.state_dict().items()}
        self._put(identities, self.disk.store(file, tensors, {"layers": json.dumps(identities)}))
        before = {self._files[name][1] for name in names if name in self._files}
        self._files |= dict.fromkeys(names, (self.place, file))
        for old in before - {name for _, name in self._files.values()}:
            self.disk.remove(old)
        self.disk.drop()

    def _put(self, identities: Mapping[str, str | None], tensors: Mapping[str, Tensor]) -> None:
        states: dict[str, dict[str, Tensor]] = {name: {} for name in identities}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            states[name][part] = tensor
        for name, identity in identities.items():
            link = None if identity is None else chain(identity).links[0]
            assert link is None or isinstance(link, Quantizer)
            self._layers[name].base.place(link, states[name])


def _place(name: str) -> int:
    return int(name.removeprefix("link").partition("-")[0])
