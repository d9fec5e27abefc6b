"""Wrong types and sizes in config.json raise LoadError in `load` and `plan`; no more than the files is allocated."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import dovetail
from dovetail.checkpoint.config import _check_counts
from dovetail.errors import DovetailError, LoadError
from dovetail.runs.plan import plan
from families import ENCODERS, make
from small_models import make_tokenizer

FAMILIES = ("llama", "gpt2", "t5", "bert", "mixtral", "gemma3")
WRONG = [5, "float8", 0, -1, 10**20, [2], "text", 1e308, {}, float("nan"), 10**9, [], "1e4", True, None]
KEYS = ["dtype", "torch_dtype", "pad_token_id", "rope_theta", "num_labels", "quantization_config", "layer_types"]


def _kind(name: str) -> str:
    return "classification" if name in ENCODERS else "generation"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return a folder for each family, and the content of its config.json."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        make(name).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        found[name] = folder, json.loads((folder / "config.json").read_text())
    return found


def _refusal(call: Callable[[], object]) -> DovetailError | None:
    try:
        call()
    except DovetailError as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_value_is_no_raw_exception(name: str, first: int, folders: dict[str, Any]) -> None:
    """Each key of the config gets one of the wrong values, another one in each family: about 200 configs."""
    folder, said = folders[name]
    keys = list(dict.fromkeys([*said, *KEYS]))[first::5]
    for key, wrong in zip(keys, islice(cycle(WRONG), first * 3 + len(name), None), strict=False):
        (folder / "config.json").write_text(json.dumps(said | {key: wrong}))
        for call in (
            lambda: dovetail.load(folder, task_kind=_kind(name)),
            lambda: plan("lora(r=2)", folder, task_kind=_kind(name), memory=False),
        ):
            error = _refusal(call)
            assert error is None or (error.where and error.rule), (key, wrong)


SIZES = {
    "llama": {"vocab_size": 4_000_000, "hidden_size": 8192, "num_attention_heads": 4096, "intermediate_size": 10**6},
    "gpt2": {"vocab_size": 4_000_000, "n_embd": 8192, "n_inner": 2_000_000, "n_positions": 3_000_000},
    "t5": {"vocab_size": 4_000_000, "d_model": 65536, "d_ff": 2_000_000, "num_heads": 50_000},
    "bert": {"vocab_size": 4_000_000, "hidden_size": 8192, "intermediate_size": 2_000_000, "type_vocab_size": 999_999},
    "mixtral": {"vocab_size": 4_000_000, "num_local_experts": 5000, "head_dim": 99_999, "intermediate_size": 2_000_000},
    "gemma3": {"vocab_size": 4_000_000, "head_dim": 99_999, "intermediate_size": 2_000_000},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "key"), [(name, key) for name in SIZES for key in SIZES[name]])
def test_sizes_are_compared_before_anything_is_allocated(name: str, key: str, folders: dict[str, Any]) -> None:
    folder, said = folders[name]
    (folder / "config.json").write_text(json.dumps(said | {key: SIZES[name][key]}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoadError) as refused:
        dovetail.load(folder, task_kind=_kind(name))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
    assert "files of" in refused.value.found or "must" in refused.value.rule


LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer", "t5": "num_layers", "bert": "num_hidden_layers"}


@pytest.mark.parametrize("count", [100_000, 10**9, 10**20])
@pytest.mark.parametrize("name", LAYERS)
def test_a_number_of_layers_has_a_bound(name: str, count: int, folders: dict[str, Any]) -> None:
    folder, said = folders[name]
    (folder / "config.json").write_text(json.dumps(said | {LAYERS[name]: count}))
    started = process_time()
    for call in (lambda: dovetail.load(folder), lambda: plan("lora(r=2)", folder, memory=False)):
        with pytest.raises(LoadError, match=LAYERS[name]):
            call()
    assert process_time() - started < 5


def test_a_config_made_in_python_has_the_same_bound() -> None:
    with pytest.raises(LoadError, match="num_hidden_layers"):
        plan("lora(r=2)", LlamaConfig(num_hidden_layers=100_000), memory=False)


@pytest.mark.parametrize("kind", [*sorted(CONFIG_MAPPING.keys())[::20], "gemma3n_text", "gemma4_text"])
def test_the_bounds_refuse_no_config_of_transformers(kind: str) -> None:
    """Gemma 3n has 262,144 tokens in what it calls vocab_size_per_layer_input."""
    try:
        config = CONFIG_MAPPING[kind]()
    except Exception as error:
        pytest.skip(f"{kind} has no default configuration: {type(error).__name__}")
    _check_counts(kind, config.to_dict())
