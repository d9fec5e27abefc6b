"""llama.cpp as the package xllamacpp has it, in a process of its own: its server may hang when it is ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any


def tokens(path: Path, *texts: str) -> list[list[int]]:
    """Return the tokens of each text for the model in a file, without the text of special tokens."""
    return _ask(path, {"texts": texts})


def likeliest(path: Path, *prompts: list[int], count: int = 1, top: int = 1) -> list[list[dict[int, float]]]:
    """Return of each prompt the log-probabilities of the likeliest tokens, by id, of steps of greedy decoding.

    There are fewer steps than `count` where the text ends, and none where the first token is the end.
    """
    said = _ask(path, {"prompts": prompts, "count": count, "top": top})
    return [[{each["id"]: each["logprob"] for each in step["top_logprobs"]} for step in steps] for steps in said]


def _ask(path: Path, question: dict[str, Any]) -> Any:
    asked = json.dumps({"path": str(path), **question})
    done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _answer(asked: dict[str, Any]) -> list[Any]:
    import xllamacpp

    library = vars(xllamacpp)
    given = library["CommonParams"]()
    given.model.path, given.n_ctx, given.warmup = asked["path"], 256, False
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    server: Any = library["Server"](given)
    found = []
    for text in asked.get("texts", ()):
        content = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        form = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.listening_address}/tokenize", content, form)
        ) as answer:
            found.append(json.loads(answer.read())["tokens"])
    for ids in asked.get("prompts", ()):
        steps = {"n_predict": asked["count"], "logprobs": asked["top"], "n_probs": asked["top"]}
        said = server.handle_completions({"prompt": ids, "temperature": 0, "top_k": 1, **steps})
        found.append((said["choices"][0]["logprobs"] or {"content": []})["content"])
    return found


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.stdin.read()))), flush=True)
    os._exit(0)
