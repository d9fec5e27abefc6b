"""Settings of training that papers report, by name: `train: {preset: clam}`; keys beside the preset take precedence.

What belongs to the chain (ranks, dropout, learning rates of links) is stated in the recipe's chain. CLAM and QR-Adaptor
page the state of AdamW, which changes where it lies and not its values: add `optimizer: paged_adamw`.

| preset | source |
|---|---|
| study/... | "A Study on PEFT Methods Applied to Quantized LLMs", Table B.1: 8B on three data sets, 70B on one |
| clam | CLAM, Table 5; its learning rates (Table 4) are those of the links |
| qr-adaptor | QR-Adaptor, appendix D: 128 rows per step, in batches of 4 |
| sqft/... | SQFT, Table 7: Llama 3 8B on GSM8K, Phi-3 Mini on math and on commonsense (cs) |
| sqft/..., -qa | the same for QA-SparsePEFT, which trains for 4 epochs on GSM8K and math |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STUDY = {"link_learning_rate": 2e-4, "schedule": "constant", "weight_decay": 0.001}
_SQFT = {"epochs": 3.0, "batch_size": 16}

TRAINING_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "study/unnatural": {**_STUDY, "batch_size": 8, "max_steps": 3000, "max_length": 384 + 128},
    "study/oasst1": {**_STUDY, "batch_size": 32, "max_steps": 1000, "max_length": 512},
    "study/hh-rlhf": {**_STUDY, "batch_size": 16, "max_steps": 3000, "max_length": 768},
    "study/unnatural-70b": {**_STUDY, "batch_size": 8, "max_steps": 2000, "max_length": 384 + 128},
    "clam": {
        "epochs": 10.0, "batch_size": 32, "weight_decay": 0.06, "schedule": "linear", "warmup": 0.0,
        "max_grad_norm": 1.0,
    },
    "qr-adaptor": {"link_learning_rate": 3e-4, "batch_size": 4, "gradient_accumulation": 32, "max_length": 256},
    "sqft/gsm8k": {**_SQFT, "link_learning_rate": 3e-4},
    "sqft/math": {**_SQFT, "link_learning_rate": 3e-4},
    "sqft/cs": {**_SQFT, "link_learning_rate": 1e-4},
    "sqft/gsm8k-qa": {**_SQFT, "link_learning_rate": 3e-4, "epochs": 4.0},
    "sqft/math-qa": {**_SQFT, "link_learning_rate": 3e-4, "epochs": 4.0},
    "sqft/cs-qa": {**_SQFT, "link_learning_rate": 1e-4},
}  # fmt: skip
"""Name -> the settings that it states (fields of `dovetail.training.settings.Training`)."""
