"""The verdict of merging, in words."""

from __future__ import annotations

from dovetail.checkpoint.merge import MergeReport


def verdict(merged: MergeReport | None, *, lossy: bool, quantized: bool) -> str:
    """Two or three sentences that say what merging kept and what it cost.

    merged     None where the chain was kept apart
    lossy      whether loss was allowed
    quantized  whether the chain has a quantizer
    """
    if merged is None:
        return "Not merged: the recipe keeps the base and the adapter apart. adapter/ holds what was trained."
    if merged.exact:
        kept = ["its zero"] if merged.sparsity_before > 0.01 else []
        kept += ["its place on the grid"] if quantized else []
        kept = [", ".join(kept), "or a bit of its precision"] if kept else ["a bit of its precision"]
        words = [f"Merged without loss: no weight lost {' '.join(kept)}."]
    elif lossy:
        words = [
            "Merged with loss, as the recipe asks: the chain doesn't keep what pruning and quantizing made, so merging "
            f"changed weights by up to {merged.max_abs_weight_diff:.2g} "
            f"({merged.relative_weight_error:.1%} of the weights' norm)."
        ]
    else:
        words = [
            "Merged, rounded once: the tuned chain never writes its weight down, so merging rounds it to the model's "
            f"dtype, by at most {merged.max_abs_weight_diff:.2g}."
        ]
    if merged.max_abs_logit_diff is not None:
        words.append(
            "The model's outputs are the same to the bit."
            if merged.max_abs_logit_diff == 0
            else f"The model's outputs differ by at most {merged.max_abs_logit_diff:.2g}."
        )
    if merged.sparsity_before > 0.01:
        words.append(f"Zeros: {merged.sparsity_before:.2%} of the weights before, {merged.sparsity_after:.2%} after.")
    if quantized:
        words.append(f"Weights off the quantization grid: {merged.off_grid}.")
    return " ".join(words)
