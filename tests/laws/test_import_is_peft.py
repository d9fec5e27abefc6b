"""Law: `import_peft(model, D)` gives the logits of `PeftModel.from_pretrained(model, D)` in float32, or LoadError.

The cases are pairs of a family and a setting of a peft adapter: each setting on a model with tied embeddings and on one
more family, and saved heads and embeddings on every family. No case trains: it moves every parameter that peft would
train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.formats.peft import import_peft
from dovetail.checkpoint.merge import merge
from dovetail.errors import LoadError
from peft_settings import FAMILIES, SETTINGS, answer, base_of, close, config_of, tuned

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

MUST_WORK = {
    "lora", "rslora", "dora", "adalora", "ia3", "loha", "vera", "head", "embedding", "both", "norm", "orthogonal",
    "mica", "drawn",
}  # fmt: skip
"""Settings that every family but the exceptions imports: the law is not met by refusing them."""
REFUSED = {("t5", "head"), ("t5", "embedding"), ("t5", "both")}
"""T5 ties its head to all its embeddings, and an encoder-decoder cannot be untied."""
OTHERS = [family for family in FAMILIES if family != "tied_llama"]
CASES = [
    *((setting, "tied_llama") for setting in SETTINGS),
    *((setting, OTHERS[turn % len(OTHERS)]) for turn, setting in enumerate(SETTINGS)),
    *((setting, family) for setting in ("head", "embedding") for family in OTHERS),
]


def imported(family: str, directory: Path) -> nn.Module | None:
    """The model with the adapter; None where LoadError refuses it and the model is as it was."""
    model = base_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        return import_peft(model, directory)
    except LoadError:
        assert not chain_layers(model)
        now = model.state_dict()
        assert before.keys() == now.keys()
        assert all(torch.equal(before[name], now[name]) for name in before)
        return None


@pytest.mark.parametrize(("setting", "family"), dict.fromkeys(CASES))
def test_import_is_peft(setting: str, family: str, tmp_path: Path) -> None:
    config = config_of(family, setting)
    try:
        tuned(family, config, tmp_path)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
        pytest.skip(f"peft itself refuses this: {error}"[:80])
    model = imported(family, tmp_path)
    if model is None:
        assert setting not in MUST_WORK or (family, setting) in REFUSED
        return
    close(answer(model), answer(peft.PeftModel.from_pretrained(base_of(family), str(tmp_path))))


@pytest.mark.parametrize(
    ("setting", "family"),
    [("head", "llama"), ("both", "tied_llama"), ("embedding", "gpt2"), ("head", "gemma"), ("embedding", "opt")],
)
def test_what_was_untied_stays_so_in_the_saved_model(setting: str, family: str, tmp_path: Path) -> None:
    tuned(family, config_of(family, setting), tmp_path / "adapter")
    model: Any = imported(family, tmp_path / "adapter")
    wanted = answer(peft.PeftModel.from_pretrained(base_of(family), str(tmp_path / "adapter")))
    assert model is not None
    merge(model, lossy=True)
    close(answer(model), wanted)
    model.save_pretrained(tmp_path / "merged")
    close(answer(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted)


@pytest.mark.parametrize("family", ["llama", "tied_llama", "gpt2"])
def test_embeddings_saved_beside_the_adapter(family: str, tmp_path: Path) -> None:
    tuned(family, config_of(family, "lora"), tmp_path, save_embedding_layers=True)
    model = imported(family, tmp_path)
    if model is not None:
        close(answer(model), answer(peft.PeftModel.from_pretrained(base_of(family), str(tmp_path))))
