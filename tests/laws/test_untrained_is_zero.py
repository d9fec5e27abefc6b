"""Law: the task vector of an untrained peft adapter is zero, outside tensors that are drawn at random.

A tensor counts as drawn at random if peft makes others from another seed, as a new classifier's head does in a new
base. An adapter whose starts are not known is refused with LoadError. What is unpacked from the vector of a trained
adapter computes what the adapter computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from dovetail import experts
from dovetail.errors import LoadError
from peft_settings import FAMILIES, SETTINGS, TARGETS, answer, base_of, close, config_of, tuned

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

METHODS: dict[str, Any] = {
    "lokr": lambda t: peft.LoKrConfig(r=4, target_modules=t),
    "boft": lambda t: peft.BOFTConfig(target_modules=t[:1], boft_block_size=4),
    "ln_tuning": lambda t: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "fourierft": lambda t: peft.FourierFTConfig(n_frequency=10, target_modules=t),
    "vblora": lambda t: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=16, topk=2, target_modules=t),
    "miss": lambda t: peft.MissConfig(r=4, target_modules=t),
    "c3a": lambda t: peft.C3AConfig(block_size=16, target_modules=t),
    "road": lambda t: peft.RoadConfig(target_modules=t, group_size=16),
    "waveft": lambda t: peft.WaveFTConfig(n_frequency=10, target_modules=t),
    "delora": lambda t: peft.DeloraConfig(r=4, target_modules=t),
    "gralora": lambda t: peft.GraloraConfig(r=4, target_modules=t),
    "hira": lambda t: peft.HiraConfig(r=4, target_modules=t),
    "lily": lambda t: peft.LilyConfig(r=4, target_modules=t[:1]),
    "psoft": lambda t: peft.PsoftConfig(r=4, target_modules=t),
    "randlora": lambda t: peft.RandLoraConfig(r=4, target_modules=t[:1]),
    "pvera": lambda t: peft.PveraConfig(r=4, target_modules=t[:1]),
    "shira": lambda t: peft.ShiraConfig(r=4, target_modules=t),
    "osf": lambda t: peft.OSFConfig(target_modules=t),
    "tinylora": lambda t: peft.TinyLoraConfig(target_modules=t[:1]),
    "tokens_alone": lambda t: peft.TrainableTokensConfig(token_indices=[5, 9]),
    "adaption_prompt": lambda t: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    "cpt": lambda t: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 9], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]
    ),
    "prompt": lambda t: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
REFUSED = {"pissa", "olora", "mica", "randlora", "pvera", "shira", "osf", "tinylora", "cpt"}
"""Settings whose starts an expert does not hold. Every other one must pack."""
OTHERS = [family for family in FAMILIES if family not in ("llama", "tied_llama")]
CASES = [
    *((setting, "llama") for setting in METHODS),
    *((setting, "tied_llama") for setting in SETTINGS),
    *((setting, OTHERS[turn % len(OTHERS)]) for turn, setting in enumerate(SETTINGS) if turn % 2),
]


def config(setting: str, family: str) -> peft.PeftConfig:
    if setting in METHODS:
        return METHODS[setting](TARGETS.get(family, ["q_proj", "o_proj"]))
    return config_of(family, setting)


def untrained(setting: str, family: str, directory: Path, seed: int, **saving: Any) -> None:
    torch.manual_seed(seed)
    try:
        model = peft.get_peft_model(base_of(family), config(setting, family))
    except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, AttributeError) as error:
        pytest.skip(f"peft itself refuses this: {error}"[:80])
    model.save_pretrained(str(directory), **saving)


def check_untrained(setting: str, family: str, folder: Path, **saving: Any) -> None:
    for seed in (0, 1):
        untrained(setting, family, folder / str(seed), seed, **saving)
    try:
        vector = experts.task_vector(folder / "0", base_of(family))
    except LoadError:
        assert setting in REFUSED
        return
    assert setting not in REFUSED
    one, two = (load_file(folder / str(seed) / "adapter_model.safetensors") for seed in (0, 1))
    for name, tensor in vector.items():
        if torch.equal(one[name], two[name]) and ".classifier." not in name:
            assert tensor.abs().max() <= 1e-6 * one[name].abs().max(), name


@pytest.mark.parametrize(("setting", "family"), dict.fromkeys(CASES))
def test_an_untrained_adapter_is_zero(setting: str, family: str, tmp_path: Path) -> None:
    check_untrained(setting, family, tmp_path)


@pytest.mark.parametrize("setting", ["lora", "on_the_embedding", "head"])
@pytest.mark.parametrize("family", ["tied_llama", "gpt2"])
def test_saved_embeddings_start_at_the_base(setting: str, family: str, tmp_path: Path) -> None:
    check_untrained(setting, family, tmp_path, save_embedding_layers=True)


COMPUTED = [
    *((setting, {}, "llama") for setting in ("tokens", "embedding", "psoft", "ln_tuning", "delora", "vera")),
    *((setting, {"save_embedding_layers": True}, "tied_llama") for setting in ("lora", "biases", "embedding", "both")),
]


@pytest.mark.parametrize(("setting", "saving", "family"), COMPUTED)
def test_what_is_unpacked_computes_the_same(setting: str, saving: Any, family: str, tmp_path: Path) -> None:
    tuned(family, config(setting, family), tmp_path / "adapter", **saving)
    vector = experts.task_vector(tmp_path / "adapter", base_of(family))
    experts.unpack(vector, tmp_path / "back", base_of(family))
    wanted = answer(peft.PeftModel.from_pretrained(base_of(family), str(tmp_path / "adapter")))
    close(answer(peft.PeftModel.from_pretrained(base_of(family), str(tmp_path / "back"))), wanted)


@pytest.mark.parametrize("setting", ["lora", "ia3"])
@pytest.mark.parametrize("scale", ["vector", "tensor"])
def test_an_embedding_has_its_own_scale(setting: str, scale: Any, tmp_path: Path) -> None:
    tuned("llama", config(setting, "llama"), tmp_path, save_embedding_layers=True)
    vector = experts.task_vector(tmp_path, base_of("llama"))
    alone = {name: tensor for name, tensor in vector.items() if "embed_tokens" not in name and "lm_head" not in name}
    assert len(alone) == len(vector) - 2
    scales = experts.compress(vector, 0.2, 1.0, scale).scales
    assert {name: scales[name] for name in alone} == experts.compress(alone, 0.2, 1.0, scale).scales


@pytest.mark.parametrize(
    ("setting", "ending"), [("lora", ".other"), ("ia3", ".default"), ("vera", ".default"), ("dora", ".default")]
)
def test_an_unknown_name_is_refused(setting: str, ending: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    untrained(setting, "llama", tmp_path, 0)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name.removesuffix(".weight") + ending] = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(LoadError, match=r"unknown tensor|other projections"):
        experts.task_vector(tmp_path, base_of("llama"))
