"""Law: two experts merge exactly if their configs differ in nothing that changes what their tensors mean.

A field that one config lacks, since another version of peft wrote it, has peft's default there. Fields that concern the
training or the choice of layers are ignored. Another value of any other field is refused by name.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch

from dovetail import experts
from dovetail.errors import DataError
from dovetail.experts.peft_adapters import IGNORED, peft_defaults, plain
from peft_settings import SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

NAMES = {
    "lora": ("lora_A.weight", "lora_B.weight"),
    "dora": ("lora_A.weight", "lora_B.weight"),
    "ia3": ("ia3_l",),
    "vera": ("vera_lambda_b",),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "adalora": ("lora_A", "lora_B", "lora_E"),
}


def config(setting: str) -> dict[str, Any]:
    """A config as its file holds it."""
    said = plain(SETTINGS[setting](["q_proj"], "llama").to_dict())
    return json.loads(json.dumps(said, default=str))


def expert(setting: str, seed: int, said: dict[str, Any]) -> experts.Expert:
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    vector = {prefix + name: torch.randn(4, 6, generator=generator) for name in NAMES[setting]}
    return experts.compress(vector, 0.5, origin=experts.Origin("peft", peft=said))


def at_defaults(setting: str) -> list[str]:
    """Return the fields of a config that have their defaults."""
    said = config(setting)
    defaults = json.loads(json.dumps(peft_defaults(said["peft_type"]), default=str))
    return [field for field, value in said.items() if field != "peft_type" and defaults.get(field) == value]


@pytest.mark.parametrize("setting", NAMES)
def test_a_field_at_its_default_may_be_missing(setting: str) -> None:
    whole = config(setting)
    assert len(at_defaults(setting)) > 8
    for field in at_defaults(setting):
        part = {key: value for key, value in whole.items() if key != field}
        for one, two in ((whole, part), (part, whole)):
            experts.merge([expert(setting, 0, one), expert(setting, 1, two)])


OTHERS: dict[str, dict[str, Any]] = {
    "peft_version": {"peft_version": "0.4.0"},
    "revision": {"revision": "main"},
    "task_type": {"task_type": "CAUSAL_LM"},
    "inference_mode": {"inference_mode": True},
    "targets": {"target_modules": ["v_proj"]},
    "excluded": {"exclude_modules": ["lm_head"]},
    "transformed": {"layers_to_transform": [0]},
    "origin": {"base_model_name_or_path": "elsewhere"},
}
NEWER = {"a field of a later peft": {"invented_in_2031": False}, "another": {"invented_in_2032": None}}
TRAINING = {"dropout": {"lora_dropout": 0.3}, "gaussian": {"init_lora_weights": "gaussian"},
            "eva": {"eva_config": {"rho": 2.0}}, "tying": {"ensure_weight_tying": False}}  # fmt: skip
CASES = [(setting, kind) for setting in ("lora", "dora", "ia3", "vera") for kind in OTHERS]
CASES += [(setting, kind) for setting in NAMES for kind in NEWER]
CASES += [(setting, kind) for setting in ("lora", "dora") for kind in TRAINING]


@pytest.mark.parametrize(("setting", "kind"), CASES)
def test_what_concerns_training_or_selection_is_ignored(setting: str, kind: str) -> None:
    said = config(setting)
    other = said | (OTHERS | NEWER | TRAINING)[kind]
    assert other != said or kind == "tying"
    experts.merge([expert(setting, 0, said), expert(setting, 1, other)])


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("lora", "lora_alpha", 99),
        ("lora", "use_rslora", True),
        ("lora", "alpha_pattern", {"q_proj": 3}),
        ("lora", "fan_in_fan_out", True),
        ("lora", "use_dora", True),
        ("loha", "alpha", 99),
        ("vera", "projection_prng_key", 5),
        ("vera", "d_initial", 0.7),
    ],
)
def test_what_changes_the_meaning_is_refused_by_name(setting: str, field: str, value: Any) -> None:
    said = config(setting)
    assert field not in IGNORED
    for missing in (False, True):
        whole = {key: each for key, each in said.items() if not (missing and key == field)}
        with pytest.raises(DataError, match=field):
            experts.merge([expert(setting, 0, whole), expert(setting, 1, said | {field: value})])


def test_the_origin_of_the_first_is_kept() -> None:
    one, two = config("lora"), config("lora") | {"peft_version": "0.4.0"}
    merged = experts.merge([expert("lora", 0, one), expert("lora", 1, two)])
    assert merged.origin == replace(merged.origin, peft=one)
    assert peft.LoraConfig(**{key: value for key, value in one.items() if key != "peft_type"})
