"""Classification and regression by a head: the likeliest label, or the value.

A score that is undefined because the model predicts the same for every record is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.tasks.scoring.runner import Runner, Scored
from dovetail.tasks.task import Record
from dovetail.tasks.tokens import check_labels, label_rows


def score_labels(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return accuracy, and matthews, Matthews' correlation (also for more than two labels)."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    check_labels(runner.name, "classification", records, runner.model)
    said = outputs(runner, records).argmax(1).numpy()
    labels = np.array([record["label"] for record in records])
    scores = {"accuracy": float(accuracy_score(labels, said)), "matthews": float(matthews_corrcoef(labels, said))}
    return scores, [str(label) for label in said]


def score_values(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return the correlations pearson and spearman of the head's values with the labels."""
    from scipy.stats import pearsonr, spearmanr

    check_labels(runner.name, "regression", records, runner.model)
    said = outputs(runner, records)[:, 0].double().numpy()
    labels = np.array([record["label"] for record in records], dtype=np.float64)
    values = [f"{value:.4g}" for value in said]
    if len(labels) < 2 or np.ptp(said) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}, values
    # pearsonr and spearmanr return (coefficient, p-value); their annotations do not show it.
    pearson, spearman = np.asarray(pearsonr(said, labels)), np.asarray(spearmanr(said, labels))
    return {"pearson": float(pearson[0]), "spearman": float(spearman[0])}, values


def outputs(runner: Runner, records: Sequence[Record]) -> Tensor:
    """Return the head's outputs, float32 (records, labels)."""
    rows = label_rows(records, runner.tokenizer, max_length=runner.max_length)
    results = torch.zeros(len(rows), runner.config.num_labels)
    for chosen, batch in runner.batches(rows):
        del batch["labels"]
        logits = runner.model(**batch).logits
        if logits.ndim != 2:
            raise DataError(
                f"task {runner.name}",
                found=f"a {type(runner.model).__name__}",
                rule="the task needs a head over texts",
                fix="load the model with a classification head",
            )
        results[chosen] = logits.float().cpu()
    return results
