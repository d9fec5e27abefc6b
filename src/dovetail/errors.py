"""Every error that Dovetail raises on purpose: one base class, one form.

A message says where it happened, what was found, the rule that it breaks and how to mend it:

    ChainError: gptq at model.layers.3.mlp.up_proj
      found: in_features=1000, group=128
      rule:  group must divide in_features
      fix:   group=125, or group=0 for one group per row
"""

from __future__ import annotations


class DovetailError(Exception):
    """Base of all errors that a user can mend. At the command line: one message, exit code 2."""

    def __init__(self, where: str, *, found: str = "", rule: str = "", fix: str = "") -> None:
        self.where, self.found, self.rule, self.fix = where, found, rule, fix
        lines = [where]
        for label, text in (("found: ", found), ("rule:  ", rule), ("fix:   ", fix)):
            if text:
                lines.append(f"  {label}{text}")
        super().__init__("\n".join(lines))


class ChainError(DovetailError):
    """A chain that can't be read, or whose links can't stand in that order or on that layer."""


class CannotMerge(DovetailError):
    """Merging would lose something: zeros, the grid, or a non-linear link."""


class TargetError(DovetailError):
    """No layer, or a layer of the wrong kind, answers to a target."""


class LoadError(DovetailError):
    """A model, tokenizer or adapter that can't be loaded, or doesn't belong to its base."""


class DataError(DovetailError):
    """Data that is missing, empty, or not of the form that its task needs."""


class RecipeError(DovetailError):
    """A recipe with an unknown key or a value out of its range."""


class SearchError(DovetailError):
    """A search that can't start: nothing to search, or a setting out of its range."""


class TrainError(DovetailError):
    """Training that can't start or that diverged."""


class CalibrationWarning(UserWarning):
    """Calibration fell back to something simpler on a layer; names the layer and the reason."""
