"""The commands of experts, as a user types them: what they write, what they print, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import dovetail
from dovetail import experts
from dovetail.cli.main import app
from dovetail.errors import DovetailError


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cli.pack", "cli.experts"):
        monkeypatch.setattr(f"dovetail.{module}.quiet", lambda: None)  # it changes this process for good


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the playground, "trained", and their experts in store/."""
    place = tmp_path_factory.mktemp("experts")
    (place / "store").mkdir()
    for number, name in enumerate(("one", "two")):
        model, _ = dovetail.load("playground")
        dovetail.apply(model, "lora(r=4)", seed=0)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        dovetail.save_adapter(model, place / name)
        experts.compress(experts.task_vector(model), 0.1).save(place / "store" / f"{name}.dvt")
    return place


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = command(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def said(*words: object) -> Any:
    return json.loads(done(*words, "--json"))


def test_pack_inspect_unpack(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.dvt"
    result = command("pack", folder / "one", "-o", file, "--base", "playground", "--density", 0.2)
    assert result.exit_code == 0
    assert "1/" in result.stdout
    assert "a sweep is advised" in result.stderr
    facts = said("inspect", file)
    assert facts["share"] == pytest.approx(0.2, abs=1e-4)
    assert facts["chain"] == "lora(r=4)"
    assert sum(facts["histogram"]["values"]) == facts["values"]
    shown = done("inspect", file, "--rows", 3)
    assert "and 53 more" in shown
    assert "█" in shown
    out = done("unpack", file, "--base", "playground", "-o", tmp_path / "back").strip()
    model, _ = dovetail.load("playground")
    dovetail.load_adapter(model, out)
    vector, wanted = experts.task_vector(model), experts.load(file).dense()
    assert all(torch.allclose(vector[name], wanted[name], atol=1e-6) for name in wanted)


def test_pack_with_a_sweep(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, plot = tmp_path / "one.dvt", tmp_path / "sweep.png"
    monkeypatch.setattr("dovetail.experts.sweeping.DENSITIES", (0.05, 0.2))
    monkeypatch.setattr("dovetail.experts.sweeping.ALPHAS", (1, 4, 8))
    sweep = ["--sweep", "acceptability", "--limit", 8, "--plot", plot]
    result = command("pack", folder / "one", "-o", file, "--base", "playground", *sweep)
    assert result.exit_code == 0, result.exception
    # A slow sweep also prints its progress, which names densities.
    assert sum(line.startswith("density") for line in result.stderr.splitlines()) == 6
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert experts.load(file).header.provenance["sweep"] == {"task": "acceptability", "limit": 8}


def test_a_peft_adapter(folder: Path, tmp_path: Path) -> None:
    from dovetail.checkpoint.formats.peft import export_peft

    model, _ = dovetail.load("playground")
    dovetail.load_adapter(model, folder / "one")
    export_peft(model, tmp_path / "peft")
    done("pack", tmp_path / "peft", "-o", tmp_path / "x.dvt", "--alpha", 1)
    assert said("inspect", tmp_path / "x.dvt")["peft_type"] == "LORA"
    done("unpack", tmp_path / "x.dvt", "-o", tmp_path / "back")
    assert (tmp_path / "back" / "adapter_config.json").is_file()


def test_list_and_verify(folder: Path, tmp_path: Path) -> None:
    rows = said("experts", "list", folder / "store")
    assert [row["name"] for row in rows] == ["one", "two"]
    assert rows[0]["kept"] == experts.load(folder / "store" / "one.dvt").kept
    assert "lora(r=4)" in done("experts", "list", folder / "store")
    assert "complete" in done("experts", "verify", folder / "store" / "one.dvt")
    data = bytearray((folder / "store" / "one.dvt").read_bytes())
    data[-9] ^= 1
    (tmp_path / "bad.dvt").write_bytes(data)
    result = command("experts", "verify", tmp_path / "bad.dvt", folder / "store" / "two.dvt")
    assert result.exit_code == 2
    assert "CRC" in result.stderr
    assert "two.dvt: complete" in result.stdout
    result = command("experts", "verify", tmp_path / "bad.dvt", folder / "store" / "two.dvt", "--json")
    assert result.exit_code == 2
    assert [(Path(row["file"]).name, row["complete"]) for row in json.loads(result.stdout)] == [
        ("bad.dvt", False), ("two.dvt", True),
    ]  # fmt: skip


def test_a_damaged_file_hides_no_other(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "store" / "one.dvt").read_bytes()
    (tmp_path / "a.dvt").write_bytes(whole[:1000])
    (tmp_path / "b.dvt").write_bytes(whole)
    rows = said("experts", "list", tmp_path)
    assert rows[0]["of"].startswith("damaged")
    assert rows[1]["of"] == "lora(r=4)"
    assert "damaged" in done("experts", "list", tmp_path)


def test_index_makes_a_store_of_a_folder(folder: Path) -> None:
    done("experts", "index", folder / "store")
    assert set(json.loads((folder / "store" / "index.json").read_text())["experts"]) == {"one", "two"}


def test_similarity(folder: Path, tmp_path: Path) -> None:
    files = [folder / "store" / f"{name}.dvt" for name in ("one", "two")]
    found = said("experts", "similarity", *files)
    assert found["pairs"][0][0]["cosine"] == pytest.approx(1.0)
    assert abs(found["pairs"][0][1]["cosine"]) < 0.1
    assert "1.00" in done("experts", "similarity", *files, "--plot", tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(command("experts", "similarity", *files, "--what", "luck").exception, DovetailError)


def test_merge(folder: Path, tmp_path: Path) -> None:
    files = [folder / "store" / f"{name}.dvt" for name in ("one", "two")]
    for method in ("average", "task_arithmetic", "ties", "dare"):
        keep = ["--keep", 0.5] if method == "dare" else []
        done("experts", "merge", *files, "--method", method, *keep, "-o", tmp_path / f"{method}.dvt")
    found = said("experts", "merge", *files, "-o", tmp_path / "again.dvt")
    assert found == {"output": str(tmp_path / "again.dvt"), "merged": ["one.dvt", "two.dvt"], "method": "average"}
    assert experts.load(tmp_path / "ties.dvt").header.provenance == {"merged": ["one.dvt", "two.dvt"], "method": "ties"}
    done("experts", "merge", *files, "--weights", "1,-0.5", "--method", "task_arithmetic", "--base", "playground", "-o",
         tmp_path / "both")  # fmt: skip
    model, _ = dovetail.load("playground")
    dovetail.load_adapter(model, tmp_path / "both")
    vector = experts.task_vector(model)
    one, two = (experts.load(file).dense() for file in files)
    assert all(torch.allclose(vector[name], one[name] - 0.5 * two[name], atol=1e-6) for name in one)
    for words in (["--weights", "1,x"], ["--weights", "1"], ["--method", "luck"]):
        bad = command("experts", "merge", *files, *words, "-o", tmp_path / "bad.dvt")
        assert isinstance(bad.exception, DovetailError)
        assert not (tmp_path / "bad.dvt").exists()


def test_compose(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nevergrad")
    files = [folder / "store" / f"{name}.dvt" for name in ("one", "two")]
    out = tmp_path / "composed.dvt"
    search = ["--task", "acceptability", "--examples", 4, "--budget", 6]
    found = said("experts", "compose", *files, "--base", "playground", *search, "-o", out)
    assert set(found["weights"]) == {"one", "two"}
    assert experts.load(out).header.provenance["composed"] == found["weights"]


def test_bench(folder: Path) -> None:
    found = said("experts", "bench", folder / "store" / "one.dvt", "--rounds", 1)
    assert set(found["seconds"]) == {"copy", "load", "verify", "dense", "masks"}
    assert "GB/s" in done("experts", "bench", folder / "store" / "one.dvt", "--rounds", 1)


def test_inspect_says_what_a_folder_is(folder: Path, tmp_path: Path) -> None:
    peft, model, empty = (tmp_path / name for name in ("peft", "model", "empty"))
    for path, file in ((peft, "adapter_config.json"), (model, "config.json"), (empty, "x")):
        path.mkdir()
        (path / file).write_text("{}")
    for path, found in (
        (folder / "one", "a Dovetail adapter"),
        (peft, "a peft adapter"),
        (model, "a model"),
        (empty, "not an expert but a folder"),
    ):
        error = command("inspect", path).exception
        assert isinstance(error, DovetailError)
        assert found in error.found
    (tmp_path / "text.dvt").write_text("text")
    assert "not an expert" in str(command("inspect", tmp_path / "text.dvt").exception)


def test_every_help_has_an_example() -> None:
    for words in (["pack"], ["unpack"], ["inspect"], ["experts"], *(["experts", name] for name in (
        "list", "similarity", "merge", "compose", "verify", "index", "bench"))):  # fmt: skip
        assert "Example: dovetail" in done(*words, "--help"), words


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "x.dvt").write_bytes(b"no expert")
    bad, none = tmp_path / "x.dvt", tmp_path / "none.dvt"
    commands = (["inspect", bad], ["inspect", none], ["experts", "list", none], ["pack", none],
                ["unpack", bad, "-o", tmp_path / "y"])  # fmt: skip
    for words in commands:
        assert isinstance(command(*words).exception, DovetailError), words
    assert not (tmp_path / "y").exists()


def test_unpack_of_a_chain_that_was_fitted_to_data(tmp_path: Path) -> None:
    model, _ = dovetail.load("playground")
    dovetail.apply(model, "wanda(0.5) >> lora(r=4) >> remask", calibration=[{"input_ids": torch.arange(40)[None]}])
    dovetail.save_adapter(model, tmp_path / "adapter")
    done("pack", tmp_path / "adapter", "-o", tmp_path / "x.dvt", "--base", "playground", "--density", 0.1)
    words = ["unpack", tmp_path / "x.dvt", "--base", "playground", "-o", tmp_path / "back"]
    refused = command(*words)
    assert "--adapter" in str(refused.exception)
    assert not (tmp_path / "back").exists()
    done(*words, "--adapter", tmp_path / "adapter")
    again, _ = dovetail.load("playground")
    dovetail.load_adapter(again, tmp_path / "back")
