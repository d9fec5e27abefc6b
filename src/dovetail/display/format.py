"""Figures as people read them, the same on the terminal and in the page."""

from __future__ import annotations

METRIC_NAMES = {
    "exact_match": "exact match",
    "accuracy_norm": "accuracy (per character)",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "nats_per_token": "nats per token",
}
_SHARES = ("exact_match", "accuracy", "accuracy_norm")


def metric_name(metric: str) -> str:
    """A metric's name in words."""
    return METRIC_NAMES.get(metric, metric)


def figure(metric: str, value: float | None) -> str:
    """A metric's value: shares in percent, correlations with three decimals."""
    if value is None:
        return "infinite"
    if metric in _SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def size(nbytes: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
