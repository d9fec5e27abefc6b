"""The delivered model does what was scored: stock `generate` on model/ and packed/ says what `evaluate` scored."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import dovetail
from dovetail.checkpoint.merge import merge, to_stock
from dovetail.runs.steps import write_packed, write_stock
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from families import make
from small_models import END, make_tokenizer, quiet, sum_records

NAMES = ["llama", "gpt2", "qwen3", "t5"]
ENDS = {"none": None, "its own": 5, "several": [1, 3], "the taught one": END}
TASK = Task("sums", "generation", "exact_match", {"train": sum_records(16), "test": sum_records(6)})


@functools.cache
def delivered(name: str, ends: str) -> tuple[Path, list[str]]:
    """The folder of a model that was compressed, trained, merged and saved, and what it said when it was scored."""
    model, tokenizer = make(name), make_tokenizer(end=name == "t5")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
        # Answers soon end at the token that is taught, and not at a token that the model ends at.
        model.get_output_embeddings().weight[END] *= 1.5
    model.generation_config.eos_token_id = ENDS[ends]
    dovetail.apply(model, "int(bits=4, group=32) >> lora(r=2) >> regrid", targets="output")
    quiet(model, TASK, tokenizer, max_steps=1)
    said: dict[str, list[str]] = {}
    evaluate(model, tokenizer, TASK, progress=False, on_outputs=said.__setitem__)
    folder = Path(tempfile.mkdtemp(prefix="delivered"))
    probe = dict(tokenizer(["one plus two"], return_tensors="pt"))
    probe.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        probe["decoder_input_ids"] = probe["input_ids"][:, :2]
    merge(model, probe=probe, packed=True)
    write_packed(folder / "packed", model, tokenizer, probe, TASK.kind)
    to_stock(model)
    write_stock(folder / "model", model, tokenizer, probe)
    return folder, said["sums"]


def generated(model: Any, tokenizer: Any) -> list[str]:
    """The greedy continuations of stock `generate`, one prompt at a time."""
    found = []
    for record in TASK.split("test"):
        fields = tokenizer(record["prompt"], return_tensors="pt")
        fields.pop("token_type_ids", None)
        tokens = model.generate(**fields, do_sample=False, max_new_tokens=5)[0]
        start = 0 if model.config.is_encoder_decoder else fields["input_ids"].shape[1]
        found.append(tokenizer.decode(tokens[start:], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("form", ["model", "packed"])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("name", NAMES)
def test_stock_generate_says_what_was_scored(name: str, ends: str, form: str) -> None:
    folder, said = delivered(name, ends)
    if form == "packed":
        model, tokenizer = dovetail.load(folder / form)
    else:
        auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        model, tokenizer = auto.from_pretrained(folder / form), make_tokenizer(end=name == "t5")
    own = model.generation_config.eos_token_id
    wanted = ENDS[ends] if isinstance(ENDS[ends], list) else [ENDS[ends]]
    assert set(own if isinstance(own, list) else [own]) == {END, *wanted} - {None}
    assert generated(model.eval(), tokenizer) == said


@pytest.mark.parametrize("ends", [7, [7, 9]])
def test_a_loaded_model_ends_where_its_tokenizer_ends(tmp_path: Path, ends: Any) -> None:
    model, tokenizer = dovetail.load("playground")
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = dovetail.load(tmp_path)
    assert set(again.generation_config.eos_token_id) == {7, tokenizer.eos_token_id, *([9] if ends != 7 else [])}
