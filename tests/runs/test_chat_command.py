"""Talking to models: turns by the chat template or plain continuations, streamed, repeatable; every result of a run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

import dovetail
from dovetail.checkpoint.load import load
from dovetail.cli.main import main
from dovetail.errors import DovetailError, LoadError
from dovetail.runs.chat import Chat
from dovetail.runs.result import load_result
from dovetail.tasks.templates import TEMPLATES
from lm_eval_cases import MODELS
from small_runs import save_labels, save_model, small_recipe
from small_tokenizers import bytes_bpe, pieces

CHATML = TEMPLATES["chatml"].replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def greedy(model, tokenizer, text: str, tokens: int) -> str:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    said = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("make", [bytes_bpe, pieces])
def test_a_plain_text_is_continued(make) -> None:
    model, tokenizer = MODELS["llama"][0](), make()
    parts: list[str] = []
    talk = Chat(model, tokenizer, max_new_tokens=40, temperature=0)
    assert not talk.templated
    answer = talk.say("The sun is a", parts.append)
    assert answer == greedy(model, tokenizer, "The sun is a", 40)
    assert "".join(parts) == answer
    assert len(parts) > 1
    assert talk.say("The sun is a") == answer  # no turn knows the turns before


def test_turns_are_those_of_the_chat_template() -> None:
    model, tokenizer = MODELS["llama"][0](), bytes_bpe()
    tokenizer.chat_template = CHATML
    talk = Chat(model, tokenizer, system="Be brief.", max_new_tokens=6, temperature=0)
    messages = [{"role": "system", "content": "Be brief."}]
    for text in ("Which is a metal?", "And a star?"):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = talk.say(text)
        assert answer == greedy(model, tokenizer, prompt, 6)
        messages.append({"role": "assistant", "content": answer})
    assert talk.forgotten == 0


def test_the_oldest_turns_are_left_out_of_a_long_conversation() -> None:
    model, tokenizer = MODELS["llama"][0](), bytes_bpe()
    tokenizer.chat_template = CHATML
    talk = Chat(model, tokenizer, max_new_tokens=8, temperature=0)
    for _ in range(4):
        talk.say("the sun is a star and the moon is not a star " * 12)
    assert 0 < talk.forgotten < 8


def test_sampling_is_repeatable_and_leaves_the_random_state() -> None:
    model, tokenizer = MODELS["llama"][0](), bytes_bpe()
    before = torch.get_rng_state()
    said = [Chat(model, tokenizer, max_new_tokens=12, temperature=2.0, seed=seed).say("The sun") for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DovetailError, match="temperature must be at least 0"):
        Chat(model, tokenizer, temperature=float("nan"))
    with pytest.raises(DovetailError, match="a system prompt needs a chat template"):
        Chat(model, tokenizer, system="Be brief.")


def test_an_encoder_decoder_answers_and_nan_is_refused() -> None:
    model, tokenizer = MODELS["t5"][0](), bytes_bpe("$A </s>")
    assert isinstance(Chat(model, tokenizer, max_new_tokens=4, temperature=0).say("The sun"), str)
    model = MODELS["llama"][0]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DovetailError, match="must be finite"):
        Chat(model, bytes_bpe(), max_new_tokens=4).say("The sun")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: merged/, and apart/, whose adapter is kept beside the base."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = small_recipe(folder, train={"max_steps": 1, "batch_size": 4}, evaluate={"limit": 4})
    dovetail.run(recipe, output=folder / "merged", progress=False)
    dovetail.run({**recipe, "merge": "none"}, output=folder / "apart", progress=False)
    return folder


@pytest.mark.parametrize("name", ["merged", "merged/packed", "merged/adapter", "apart", "apart/adapter"])
def test_every_result_of_a_run_is_the_same_model(name: str, runs: Path) -> None:
    ids = torch.tensor([[4, 5, 6]])
    wanted = load(runs / "merged" / "model")[0]
    found, tokenizer = load_result(runs / name)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, wanted(ids).logits)
    said = Chat(found, tokenizer, max_new_tokens=4, temperature=0).say("the sum of one plus two is")
    assert said == Chat(wanted, tokenizer, max_new_tokens=4, temperature=0).say("the sum of one plus two is")


def test_what_cannot_be_talked_to_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="at most one adapter"):
        load_result(runs / "apart" / "adapter", adapter=runs / "apart" / "adapter")
    alone = tmp_path / "alone"
    (runs / "apart" / "adapter").rename(alone)
    try:
        with pytest.raises(LoadError, match=f"BASE --adapter {alone}"):
            load_result(alone)
        assert load_result(runs / "base", adapter=alone)[0].can_generate()
    finally:
        alone.rename(runs / "apart" / "adapter")
    (tmp_path / "stopped.partial").mkdir()
    (tmp_path / "stopped.partial" / "recipe.yaml").write_text("")
    with pytest.raises(LoadError, match="a run must be finished"):
        load_result(tmp_path / "stopped")


def test_a_peft_adapter_names_its_base(runs: Path, tmp_path: Path) -> None:
    model, _ = load(runs / "base")
    dovetail.apply(model, "lora(r=4)", seed=0)
    dovetail.export_peft(model, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(runs / "base")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    found, _ = load_result(tmp_path / "peft")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-6)


@pytest.fixture
def spoken(monkeypatch, capsys):
    """Runs `dovetail chat ARGUMENTS` with lines on standard input; returns exit code, standard output and error."""

    def call(text: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", "chat", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr("dovetail.cli.own.quiet", lambda: None)
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


def test_the_command_answers_each_line(spoken, runs: Path) -> None:
    options = (runs / "merged", "--max-new-tokens", 3, "--temperature", 0)
    code, out, err = spoken("the sum of one plus two is\n\n/exit\nthree\n", *options)
    assert code == 0
    assert len(out.splitlines()) == 1
    assert "the tokenizer has no chat template" in err
    again = spoken("the sum of \\\none plus two is", *options)[1]
    assert again == out  # this tokenizer knows no line ends


def test_a_classifier_is_refused(spoken, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, chain="lora(r=2)", data=save_labels(tmp_path),
                          model=str(save_model(tmp_path / "bert", labels=2)),
                          train={"max_steps": 1}, evaluate={"limit": 4})  # fmt: skip
    dovetail.run(recipe, output=tmp_path / "labels", progress=False)
    code, out, err = spoken("one\n", tmp_path / "labels")
    assert (code, out) == (2, "")
    assert "the model must be a language model" in err
