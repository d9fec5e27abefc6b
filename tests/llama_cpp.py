"""llama.cpp as the package xllamacpp has it: a server in this process, of one file, on one thread."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any


class Engine:
    """A file in llama.cpp."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        library = vars(xllamacpp)
        asked = library["CommonParams"]()
        asked.model.path, asked.n_ctx, asked.warmup = str(path), 256, False
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
        self.server: Any = library["Server"](asked)

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text, without the text of special tokens in it."""
        content = {"content": text, "add_special": special, "parse_special": False}
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())["tokens"]

    def likeliest(self, ids: list[int], count: int, top: int = 1) -> list[dict[int, float]]:
        """Return the log-probabilities of the likeliest tokens, by id, of `count` steps of greedy decoding."""
        said = self.server.handle_completions(
            {"prompt": ids, "temperature": 0, "top_k": 1, "n_predict": count, "logprobs": top, "n_probs": top}
        )
        steps = (said["choices"][0]["logprobs"] or {"content": []})["content"]  # none where the first one is the end
        return [{each["id"]: each["logprob"] for each in step["top_logprobs"]} for step in steps]
