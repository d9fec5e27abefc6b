"""Numbers and units as text, the same on the terminal and on a page."""

from __future__ import annotations

METRIC_NAMES = {
    "exact_match": "exact match",
    "accuracy_norm": "normalized accuracy",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "nats_per_token": "nats per token",
    "word_perplexity": "word perplexity",
    "byte_perplexity": "byte perplexity",
    "bits_per_byte": "bits per byte",
}
SHARES = ("exact_match", "accuracy", "accuracy_norm")
"""Metrics that are a share of the records; they are shown in percent."""


def metric_name(metric: str) -> str:
    """Return the name of a metric in words."""
    return METRIC_NAMES.get(metric, metric)


def format_score(metric: str, value: float | None) -> str:
    """Format the value of a metric: shares in percent, other metrics with three decimals; None is not finite."""
    if value is None:
        return "not finite"
    if metric in SHARES:
        return percent(value)
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def percent(share: float, digits: int = 1) -> str:
    """Format a share in percent."""
    return f"{100 * share:.{digits}f} %"


def size(nbytes: float) -> str:
    """Format a number of bytes in decimal units, with three digits."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
