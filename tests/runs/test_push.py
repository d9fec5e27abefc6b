"""`dovetail push`, at a stand-in of huggingface_hub's API: what is uploaded, and what an unreachable hub says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import dovetail
from dovetail.errors import DovetailError, OutputError
from dovetail.runs.push import push
from small_runs import small_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    recipe = small_recipe(folder, train={"max_steps": 1, "batch_size": 4}, evaluate={"limit": 4})
    dovetail.run(recipe, output=folder / "run", progress=False)
    return folder / "run"


class Hub:
    """Stands in for huggingface_hub.HfApi: keeps what it is given, or raises."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    problem: ClassVar[Exception | None] = None

    def __init__(self, **_: Any) -> None:
        pass

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool | None, exist_ok: bool) -> Any:
        if self.problem is not None:
            raise self.problem
        self.calls.append(("create_repo", {"repo_id": repo_id, "private": private}))
        assert (repo_type, exist_ok) == ("model", True)
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, repo_type: str, commit_message: str) -> Any:
        names = sorted(path.name for path in folder_path.iterdir())
        self.calls.append(("upload_folder", {"repo_id": repo_id, "names": names, "message": commit_message}))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_the_merged_model_is_uploaded_with_its_card(run: Path, hub: type[Hub]) -> None:
    assert push(run, "sums", private=True) == "https://huggingface.co/me/sums/commit/1"
    (_, created), (_, uploaded) = hub.calls
    assert created == {"repo_id": "sums", "private": True}
    assert uploaded["repo_id"] == "me/sums"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded["names"])
    assert uploaded["message"].startswith("Upload model: wanda(0.5)")


def test_other_parts(run: Path, hub: type[Hub]) -> None:
    push(run, "you/sums", part="adapter")
    assert hub.calls[-1][1]["names"] == ["adapter.json", "adapter.safetensors"]
    assert hub.calls[0][1] == {"repo_id": "you/sums", "private": None}
    push(run, "you/sums", part="packed")
    assert "packed.safetensors" in hub.calls[-1][1]["names"]


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (LocalTokenNotFoundError("Token is required"), "hf auth login"),
        (HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=httpx.Request("POST", "https://hub"))),
         "may write to this repository"),
        (httpx.ConnectError("Name or service not known"), "the hub must be reachable"),
        (OSError("offline mode is enabled"), "the hub must be reachable"),
    ],
)  # fmt: skip
def test_a_hub_that_refuses_is_one_message(
    run: Path, hub: type[Hub], monkeypatch, problem: Exception, said: str
) -> None:
    monkeypatch.setattr(hub, "problem", problem)
    with pytest.raises(OutputError, match=said):
        push(run, "me/sums")


def test_what_is_no_run_is_refused(run: Path, hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(DovetailError, match=r"report\.json"):
        push(tmp_path, "me/sums")
    with pytest.raises(DovetailError, match="model, packed, adapter"):
        push(run, "me/sums", part="weights")
    assert not hub.calls


def test_a_name_that_the_hub_does_not_allow(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked by huggingface_hub itself, before it connects."""
    with pytest.raises(OutputError, match="NAME or OWNER/NAME"):
        push(run, "a/b/c")
