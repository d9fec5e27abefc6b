"""Make lm_eval.json: the requests and scores of lm-eval 0.4's HFLM on tiny models, for `tests/laws/test_lm_eval.py`.

Needs lm-eval, which Dovetail does not depend on: pip install "lm-eval[hf]==0.4.13", then
PYTHONPATH=src:tests python tests/golden/lm_eval_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_cases import ENDINGS, MODELS, TOKENIZERS, records


def reference(lm: HFLM, ending: str) -> list[dict[str, Any] | None]:
    """Tokens and log-likelihoods of every request, and its metrics as ConfigurableTask.process_results has them.

    None for a record of which lm-eval leaves a choice without a token, which it refuses by an assertion, and for a
    prompt with a begin token of its own before an encoder, where lm-eval leaves out the tokenizer's end token too.
    """
    found: list[dict[str, Any] | None] = []
    for record in records(ending):
        delimiter = " " if all(choice.startswith(" ") for choice in record["choices"]) else ""
        choices = [choice.removeprefix(delimiter) for choice in record["choices"]]
        pairs = [(record["prompt"], f"{delimiter}{choice}") for choice in choices]
        split = [lm._encode_pair(*pair) for pair in pairs]
        begun = lm.backend == "seq2seq" and record["prompt"].startswith("<s>")
        if begun or not all(continuation for _, continuation in split):
            found.append(None)
            continue
        requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
        sums = np.array([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
        lengths = np.array([float(len(choice)) for choice in choices])
        right = [int(np.argmax(scores)) == record["label"] for scores in (sums, sums / lengths)]
        found.append({"split": split, "sums": sums.tolist(), "right": right})
    return found


if __name__ == "__main__":
    made = {
        f"{model}, {name}, {ending!r}": reference(
            HFLM(pretrained=make(), tokenizer=tokenizer(form), backend=backend, batch_size=4, max_length=512), ending
        )
        for model, (make, backend, form) in MODELS.items()
        for name, tokenizer in TOKENIZERS.items()
        for ending in ENDINGS
    }
    Path(__file__).with_name("lm_eval.json").write_text(json.dumps(made) + "\n", encoding="utf-8")
