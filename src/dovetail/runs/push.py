"""Upload the result of a run to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from dovetail.errors import DovetailError, OutputError
from dovetail.runs.folder import ADAPTER, MODEL, PACKED
from dovetail.runs.report.record import Report

PARTS = (MODEL, PACKED, ADAPTER)
"""The folders of a run that can be uploaded."""


def push(run: str | Path, repo: str, *, part: str = MODEL, private: bool = False) -> str:
    """Upload the merged model of a run, or another part, to the hub, and return the address of the commit.

    run      a run directory
    repo     NAME or OWNER/NAME of a model repository, which is created if there is none
    part     the folder of the run, one of PARTS
    private  create the repository as a private one; one that exists keeps its setting

    The token is the one that `hf auth login` stored, or the environment variable HF_TOKEN. Raises DovetailError for a
    folder that is no finished run, and OutputError where the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    run = Path(run)
    if part not in PARTS:
        rule = "the part of a run must be one of " + ", ".join(PARTS)
        raise DovetailError("push", found=part, rule=rule, fix="name one of these parts")
    report = Report.load(run)
    folder = run / part
    if not folder.is_dir():
        there = [name for name in PARTS if (run / name).is_dir()]
        rule = f"the run must contain {folder.name}/"
        raise DovetailError(str(run), found="no such folder", rule=rule, fix=f"push another part: {', '.join(there)}")
    where = f"push {folder} to {repo}"
    api = HfApi(library_name="dovetail")
    try:
        made = api.create_repo(repo, repo_type="model", private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, repo_type="model",
            commit_message=f"Upload {folder.name}: {report.chain}"[:200],
        )  # fmt: skip
    except HFValidationError as error:
        rule = "the repository must be NAME or OWNER/NAME"
        raise OutputError(where, found=str(error).splitlines()[0][:300], rule=rule, fix="change the name") from None
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        rule = "the hub must accept the token and the upload"
        fix = "log in with `hf auth login`, or set HF_TOKEN to a token that may write to this repository"
        raise OutputError(where, found=_said(error), rule=rule, fix=fix) from None
    except Exception as error:  # whichever class the hub's HTTP client of the day has for "unreachable"
        rule = "the hub must be reachable"
        fix = "check the connection, and that HF_HUB_OFFLINE is not set; the same command then continues"
        raise OutputError(where, found=_said(error), rule=rule, fix=fix) from None
    return commit.commit_url


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
