"""Experts as somebody uses them for the first time: wrong paths and options, and what he waits for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dovetail
from dovetail import experts
from dovetail.cli import main as cli
from dovetail.errors import DovetailError

CHAIN = "lora(r=4)"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cli.pack", "cli.experts"):
        monkeypatch.setattr(f"dovetail.{module}.quiet", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the playground with random values, and its expert."""
    place = tmp_path_factory.mktemp("use")
    model = adapted(CHAIN)
    dovetail.save_adapter(model, place / "one")
    experts.compress(experts.task_vector(model), 0.1, 4.0).save(place / "one.dvt")
    return place


def adapted(chain: str, **options: object) -> torch.nn.Module:
    model, _ = dovetail.load("playground", **options)  # type: ignore[arg-type]
    dovetail.apply(model, chain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_importing_experts_waits_for_nothing() -> None:
    code = """
import sys
from dovetail import experts
assert "torch" not in sys.modules
import dovetail.cli.expert_tables
assert callable(experts.load)
assert not {"transformers", "matplotlib", "sklearn"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    import dovetail.experts.sweeping

    assert callable(dovetail.experts.sweep)  # the function, also after the module of that name has been imported
    assert dovetail.experts.baselines.stc
    assert "sweep" in dir(experts)
    with pytest.raises(AttributeError, match="luck"):
        _ = dovetail.luck  # type: ignore[attr-defined]


def test_what_cannot_be_written_is_said_before_any_work(folder: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "adapter.json").write_text("{}")
    one, base = folder / "one.dvt", ["--base", "playground"]
    pack, merge = ["pack", folder / "one", *base, "--alpha", 1], ["experts", "merge", one, *base]
    for words in (
        [*pack, "-o", tmp_path / "file" / "x.dvt"], [*pack, "-o", tmp_path / "full"],
        [*pack, "-o", tmp_path / "a.dvt", "--sweep", "acceptability", "--plot", tmp_path / "file" / "x.png"],
        ["unpack", one, *base, "-o", tmp_path / "file"], ["unpack", one, *base, "-o", tmp_path / "full"],
        ["unpack", one, *base, "-o", tmp_path / "file" / "x"],
        [*merge, "-o", tmp_path / "file" / "x.dvt"], [*merge, "-o", tmp_path / "full"],
        ["experts", "similarity", one, one, "--plot", tmp_path / "full"],
    ):  # fmt: skip
        code, _, err = command(*words)
        assert code == 2, words
        assert err.startswith("DovetailError: output "), (words, err)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter.json", "file", "full"]


def test_folders_are_made(folder: Path, tmp_path: Path, command: Command) -> None:
    one = folder / "one.dvt"
    command("pack", folder / "one", "--base", "playground", "-o", tmp_path / "a" / "x.dvt")
    command("experts", "similarity", one, "--plot", tmp_path / "b" / "x.png")
    assert (tmp_path / "a" / "x.dvt").is_file()
    assert (tmp_path / "b" / "x.png").is_file()
    with pytest.raises(DovetailError, match=r"output .*y\.dvt"):
        experts.load(one).save(tmp_path / "a" / "x.dvt" / "y.dvt")


def test_sources_that_are_none(tmp_path: Path, command: Command) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    for source, found in (("nothing", "no such folder"), ("x.safetensors", "a file"), (".", "none of adapter.json")):
        for base in ([], ["--base", "playground"]):
            code, _, err = command("pack", tmp_path / source, *base, "-o", tmp_path / "x.dvt")
            assert code == 2
            assert f"found: {found}" in err
    code, _, err = command("inspect", tmp_path / "x.safetensors")
    assert code == 2
    assert "make one with `dovetail pack`" in err
    code, _, err = command("experts", "list", tmp_path / "nothing")
    assert (code, "no such folder" in err) == (2, True)


def test_options_that_would_be_ignored_are_refused(folder: Path, tmp_path: Path, command: Command) -> None:
    one, out = folder / "one.dvt", tmp_path / "x.dvt"
    pack, merge = ["pack", folder / "one", "--base", "playground", "-o", out], ["experts", "merge", one, "-o", out]
    for words, where in (
        ([*pack, "--plot", tmp_path / "p.png"], "--plot"), ([*pack, "--limit", 3], "--limit"),
        ([*pack, "--scale", "luck"], "--scale"), (["pack", folder / "one", "--sweep", "acceptability"], "--sweep"),
        ([*merge, "--keep", 0.5], "--keep"), ([*merge, "--method", "dare"], "--keep"),
    ):  # fmt: skip
        code, _, err = command(*words)
        assert code == 2
        assert err.startswith(f"DataError: {where}\n"), err
    assert not out.exists()


def test_a_sweep_at_a_given_alpha(folder: Path, tmp_path: Path, command: Command) -> None:
    sweep = ["--sweep", "acceptability", "--limit", 2, "--alpha", 3, "--density", 0.3]
    code, _, err = command("pack", folder / "one", "--base", "playground", *sweep, "-o", tmp_path / "x.dvt")
    assert code == 0
    assert err.count("density") == 1
    made = experts.load(tmp_path / "x.dvt")
    assert (made.density, made.alpha) == (0.3, 3.0)


def test_a_sweep_of_what_was_fitted_to_data(tmp_path: Path, command: Command) -> None:
    model, _ = dovetail.load("playground")
    batches = [{"input_ids": torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))}]
    dovetail.apply(model, "wanda(0.5) >> lora(r=2) >> remask", calibration=batches)
    dovetail.save_adapter(model, tmp_path / "pruned")
    words = ["--sweep", "acceptability", "--limit", 2, "--alpha", 1, "--density", 0.5, "-o", tmp_path / "x.dvt"]
    code, _, err = command("pack", tmp_path / "pruned", "--base", "playground", *words)
    assert code == 0, err


def test_the_default_name_keeps_dots(folder: Path, tmp_path: Path, command: Command) -> None:
    experts.unpack(experts.load(folder / "one.dvt"), tmp_path / "french-1.5", dovetail.load("playground")[0])
    code, out, _ = command("pack", tmp_path / "french-1.5", "--base", "playground", "--alpha", 1)
    assert code == 0
    assert "french-1.5.dvt" in out
    assert (tmp_path / "french-1.5.dvt").is_file()


def test_merging_one_expert_gives_it_back(folder: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "x.dvt"
    command("experts", "merge", folder / "one.dvt", "-o", out)
    before, after = experts.load(folder / "one.dvt").dense(), experts.load(out).dense()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


def test_experts_are_shown_short(folder: Path, command: Command) -> None:
    expert = experts.load(folder / "one.dvt")
    assert repr(expert).startswith("Expert(56 tensors, 4,096 of 40,960 values kept, density=0.1, alpha=4, Origin(")
    assert len(repr(expert)) < 300
    _, out, _ = command("inspect", folder / "one.dvt")
    assert "one scale for all" in out
    _, out, _ = command("experts", "similarity", folder / "one.dvt", "--what", "hamming")
    assert "share of equal values" in out


@pytest.mark.parametrize("what", ["head", "bf16"])
def test_adapters_of_classifiers_and_of_bf16_find_their_base(what: str, tmp_path: Path, command: Command) -> None:
    options = {"task_kind": "classification", "num_labels": 3} if what == "head" else {"dtype": "bfloat16"}
    dovetail.save_adapter(adapted(CHAIN, **options), tmp_path / "one")
    base, out = ["--base", "playground"], tmp_path / "x.dvt"
    code, _, err = command("pack", tmp_path / "one", *base, "--alpha", 1, "-o", out)
    assert code == 0, err
    assert any(name.startswith("head/") for name in experts.load(out).shapes) == (what == "head")
    code, _, err = command("unpack", out, *base, "-o", tmp_path / "back")
    assert code == 0, err
    model, _ = dovetail.load("playground", **options)  # type: ignore[arg-type]
    dovetail.load_adapter(model, tmp_path / "back")


def test_help_tells_the_defaults(command: Command) -> None:
    for words, default in ((["pack"], "0.05"), (["experts", "merge"], "1 each"), (["run"], "runs/NAME")):
        code, out, _ = command(*words, "--help")
        assert code == 0
        assert f"default: {default}" in " ".join(out.replace("│", " ").split())
