"""An adapter that was changed since it was saved is refused, and the model is then unchanged.

Any flipped bit of `adapter.safetensors` or `adapter.json` counts. An adapter of an earlier version has no digest and
loads with a warning.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch

import dovetail
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import load_adapter, save_adapter
from dovetail.errors import LoadError
from families import batch, logits, make, move

CASES = {
    "lora(r=4)": "llama",
    "dora(r=4)": "llama",
    "vera(r=4)": "qwen3",
    "ia3": "t5",
    "loha(r=4)": "gpt2",
    "bottleneck(r=4)": "bert",
    "lora(r=4, elastic=[4, 2])": "llama",
    "magnitude(0.5) >> lora(r=4) >> remask": "mistral",
    "nf4 >> lora(r=4) >> regrid": "llama",
    "magnitude(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid": "llama",
}
FLIPS = 12


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, torch.Tensor]:
    """A family, a folder with an adapter of it, and the logits of the model that was saved."""
    family, folder = CASES[request.param], tmp_path_factory.mktemp("adapter")
    model = dovetail.apply(make(family), request.param)
    move(model)
    save_adapter(model, folder)
    with torch.no_grad():
        return family, folder, logits(model, batch(model))


@pytest.mark.parametrize("file", ["adapter.safetensors", "adapter.json"])
def test_a_flipped_bit_is_refused(file: str, saved: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    family, folder, wanted = saved
    whole, rng = (folder / file).read_bytes(), Random(0)
    model = make(family)
    first = 8 + int.from_bytes(whole[:8], "little") if file == "adapter.safetensors" else 0
    for place in [first, len(whole) - 2, *(rng.randrange(len(whole)) for _ in range(FLIPS))]:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / file).write_bytes(changed)
        try:
            loaded = load_adapter(model, tmp_path)
        except LoadError:
            assert not chain_layers(model)
            continue
        # White space, and the padding of the header, have no meaning: what is loaded is what was saved.
        with torch.no_grad():
            assert torch.equal(logits(loaded, batch(loaded)), wanted), f"byte {place} of {len(whole)}"
        model = make(family)


def test_an_adapter_without_a_digest_loads_and_says_so(saved: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    family, folder, wanted = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said = json.loads((tmp_path / "adapter.json").read_text())
    del said["digest"]
    (tmp_path / "adapter.json").write_text(json.dumps(said))
    with pytest.warns(UserWarning, match="no digest"):
        loaded = load_adapter(make(family), tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(loaded, batch(loaded)), wanted)
