"""Models of images and texts, trained on texts: whole when loaded, and whole when saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import dovetail
from dovetail.errors import DataError
from small_models import make_tokenizer
from small_runs import save_sums

TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EXACT = "wanda(0.5) >> int(bits=4, group=32) >> lora(r=2) >> remask >> regrid"


@pytest.fixture(params=["mistral3", "llava", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    kinds = {"mistral3": ("mistral", "pixtral"), "llava": ("llama", "clip_vision_model")}
    text, vision = kinds.get(request.param, ("gemma3_text", "siglip_vision_model"))
    config = CONFIG_MAPPING[request.param](
        text_config={**TEXT, "model_type": text},
        vision_config={**VISION, "model_type": vision},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"image_size": 32}')
    return tmp_path / "model"


def test_it_is_tuned_on_texts_and_saved_whole(folder: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(folder), "chain": EXACT, "data": save_sums(tmp_path), "train": {"max_steps": 2, "batch_size": 4},
        "targets": ["all-linear", "!*vision_tower*", "!*projector*"], "calibration": {"samples": 8},
    }  # fmt: skip
    report = dovetail.run(recipe, output=tmp_path / "run", progress=False)
    assert report.merge is not None
    assert report.merge.exact
    assert report.checkpoint is not None
    assert report.checkpoint.max_abs_logit_diff == 0
    assert report.stages[-1].footprint.left_out["vision tower"] > 0
    made = tmp_path / "run" / "model"
    assert (made / "preprocessor_config.json").read_text() == '{"image_size": 32}'
    stock, info = AutoModelForImageTextToText.from_pretrained(made, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    packed, _ = dovetail.load(tmp_path / "run" / "packed")
    ids = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(stock.eval()(input_ids=ids).logits, packed(input_ids=ids).logits)


def test_a_tower_that_no_text_reaches_is_named(folder: Path, tmp_path: Path) -> None:
    model, _ = dovetail.load(folder)
    text = {"input_ids": torch.arange(3, 19)[None]}
    with pytest.raises(DataError, match=r"vision_tower.*\n.*found: no input"):
        dovetail.apply(model, EXACT, calibration=[text])
