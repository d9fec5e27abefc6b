"""`dovetail evaluate`: runs and their own data, samples, MMLU's files, and lm-eval's tasks where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import dovetail
from dovetail.cli.main import main
from lm_eval_cases import MODELS
from small_runs import small_recipe, write_lines
from small_tokenizers import bytes_bpe

with_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'dovetail[eval]'"
)
ROWS = [{"question": f"Which is metal {n}?", "choices": ["copper", "water", "eggs"], "answer": n % 3} for n in range(9)]


@pytest.fixture
def scored(monkeypatch, capsys):
    """Runs `dovetail evaluate ARGUMENTS`; returns exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", "evaluate", *map(str, arguments)])
        monkeypatch.setattr("dovetail.cli.evaluate.quiet", lambda: None)
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluate")
    recipe = small_recipe(folder, train={"max_steps": 1, "batch_size": 4})
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    dovetail.run(folder / "recipe.yaml", output=folder / "run", progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    MODELS["llama"][0]().save_pretrained(folder)
    bytes_bpe("<s> $A").save_pretrained(folder)
    return folder


def test_a_run_is_scored_on_its_own_data(scored, run: Path) -> None:
    code, out, _ = scored(run, "--json")
    assert code == 0
    last = json.loads((run / "report.json").read_text())["stages"][-1]["metrics"]
    assert json.loads(out) == last
    for name in ("adapter", "packed"):
        assert json.loads(scored(run / name, "--json")[1]) == last
    code, out, _ = scored(run, "--samples", 2)
    assert out.count("expected") == out.count("output") == 2
    assert "sums, record 2" in out
    found = json.loads(scored(run, "--samples", 1, "--json")[1])
    assert found["scores"] == last
    assert set(found["samples"]["sums"][0]) == {"prompt", "expected", "output"}


def test_a_model_without_data_needs_a_task(scored) -> None:
    code, out, err = scored("playground")
    assert (code, out) == (2, "")
    assert "pass --task TASK" in err


def test_shots_and_lengths_are_options(scored, run: Path) -> None:
    plain = json.loads(scored(run, "--json", "--limit", 8)[1])
    shot = json.loads(scored(run, "--json", "--limit", 8, "--shots", 1, "--max-length", 60)[1])
    assert plain["sums"]["n"] == shot["sums"]["n"] == 8
    code, _, err = scored(run, "--shots", 100)
    assert code == 2
    assert "examples for 100 shots" in err


def test_mmlu_of_local_files(scored, llama: Path, tmp_path: Path) -> None:
    for subject, count in (("anatomy", 2), ("virology", 4)):
        for split, rows in (("dev", 5), ("test", count)):
            (tmp_path / split).mkdir(exist_ok=True)
            with (tmp_path / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([f"{split} {n}?", "a", "b", "c", "d", "ABCD"[n % 4]] for n in range(rows))
    found = json.loads(scored(llama, "--task", f"mmlu:{tmp_path}", "--json")[1])
    parts = [found[f"mmlu_{subject}"] for subject in ("anatomy", "virology")]
    assert [part["n"] for part in parts] == [2, 4]
    assert found["mmlu"]["n"] == 6
    assert found["mmlu"]["accuracy"] == pytest.approx(sum(part["accuracy"] * part["n"] for part in parts) / 6)


def test_lm_eval_that_is_not_installed_is_one_message(scored, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    code, out, err = scored("playground", "--task", "lm-eval:arc_easy")
    assert (code, out) == (2, "")
    assert "pip install 'dovetail[eval]'" in err


@with_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_a_local_yaml_task_has_the_scores_of_dovetail(scored, llama: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", ROWS)
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "own_metals", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer", "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                        for name in ("acc", "acc_norm", "acc_bytes")],
    }  # fmt: skip
    (tmp_path / "tasks" / "own.yaml").write_text(json.dumps(task))
    options = ("--task", "lm-eval:own_metals", "--include", tmp_path / "tasks")
    found = json.loads(scored(llama, *options, "--json", "--samples", 9)[1])
    theirs = found["scores"]["own_metals"]
    records = [{"prompt": f"Question: {row['question']}\nAnswer:", "choices": [f" {one}" for one in row["choices"]],
                "label": row["answer"]} for row in ROWS]  # fmt: skip
    for unit, name in (("characters", "acc_norm"), ("bytes", "acc_bytes")):
        rules = dovetail.Scoring(normalize=unit)
        own = dovetail.Task("own", "choice", "accuracy", {"test": records}, rules)
        outputs: dict[str, list[str]] = {}
        ours = dovetail.evaluate(*dovetail.load(llama), own, progress=False, on_outputs=outputs.__setitem__)["own"]
        assert (theirs["acc"], theirs[name], theirs["n"]) == (ours["accuracy"], ours["accuracy_norm"], 9)
        assert [each["output"] for each in found["samples"]["own_metals"]] == outputs["own"]
    code, _, err = scored(llama, "--task", "lm-eval:other", "--include", tmp_path / "tasks")
    assert code == 2
    assert "the tasks there are own_metals" in err
