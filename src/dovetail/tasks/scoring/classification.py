"""Classification and regression by a head: the likeliest label, or the value.

A score that is undefined because the model predicts the same for every record is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dovetail.tasks.scoring.runner import Runner, Scored
from dovetail.tasks.task import Record
from dovetail.tasks.vocabulary import check_model, wrong_model


def score_labels(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return accuracy, and matthews, Matthews' correlation (also for more than two labels)."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    said = _outputs(runner, "classification", records).argmax(1).numpy()
    labels = np.array([record["label"] for record in records])
    scores = {"accuracy": float(accuracy_score(labels, said)), "matthews": float(matthews_corrcoef(labels, said))}
    return scores, [str(label) for label in said]


def score_values(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return the correlations pearson and spearman of the head's values with the labels."""
    from scipy.stats import pearsonr, spearmanr

    said = _outputs(runner, "regression", records)[:, 0].double().numpy()
    labels = np.array([record["label"] for record in records], dtype=np.float64)
    values = [f"{value:.4g}" for value in said]
    if len(labels) < 2 or np.ptp(said) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}, values
    # pearsonr and spearmanr return (coefficient, p-value); their annotations do not show it.
    pearson, spearman = np.asarray(pearsonr(said, labels)), np.asarray(spearmanr(said, labels))
    return {"pearson": float(pearson[0]), "spearman": float(spearman[0])}, values


def _outputs(runner: Runner, kind: str, records: Sequence[Record]) -> Tensor:
    """Return the head's outputs, float32 (records, labels)."""
    check_model(runner.name, kind, records, runner.model)
    rows = runner.make.labels(records)
    results = torch.zeros(len(rows), runner.config.num_labels)
    for chosen, batch in runner.batches(rows):
        logits = runner.logits(batch)
        if logits.ndim != 2:
            raise wrong_model(runner.name, runner.model, head=kind)
        if not bool(logits.isfinite().all()):
            raise runner.not_finite(lambda batch=batch: runner.logits(batch))
        results[chosen] = logits.float().cpu()
    return runner.whole(results)
