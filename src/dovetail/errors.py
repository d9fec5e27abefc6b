"""The errors that Dovetail raises: one base class, one form of message.

A message states the place, what was found, the rule that it breaks, and the fix:

    ChainError: gptq at model.layers.3.mlp.up_proj
      found: in_features=1000, group=128
      rule:  group must divide in_features
      fix:   group=125, or group=0 for one group per row
"""

from __future__ import annotations


class DovetailError(Exception):
    """Base of all user-correctable errors. The command line prints one message and exits with code 2."""

    def __init__(self, where: str, *, found: str = "", rule: str = "", fix: str = "") -> None:
        self.where, self.found, self.rule, self.fix = where, found, rule, fix
        lines = [where]
        for label, text in (("found: ", found), ("rule:  ", rule), ("fix:   ", fix)):
            if text:
                lines.append(f"  {label}{text}")
        super().__init__("\n".join(lines))


class ChainError(DovetailError):
    """A chain that cannot be parsed, or whose links do not fit in that order or on that layer."""


class CannotMerge(DovetailError):
    """A merge that would lose zeros, the grid, or a non-linear link."""


class ExportError(DovetailError):
    """A layer that another format does not hold, or bytes that its owner decodes to other values."""


class TargetError(DovetailError):
    """A target that matches no layer, or a layer of an unsupported kind."""


class LoadError(DovetailError):
    """A model, tokenizer or adapter that cannot be loaded or does not belong to its base."""


class DataError(DovetailError):
    """Data that is missing, empty, or of another form than its task needs."""


class NotFinite(DataError):
    """A model that computes NaN or infinity; the message names the first module that does so."""


class RecipeError(DovetailError):
    """A recipe with an unknown key or a value out of range."""


class SearchError(DovetailError):
    """A search that cannot start: nothing to search, or a setting out of range."""


class TrainError(DovetailError):
    """Training that cannot start or that diverged."""


class HistoryWarning(UserWarning):
    """What an earlier round of a merged model promised no longer holds, or a chain gives it up."""


class ConversionWarning(UserWarning):
    """What a file of another format says, and the loaded model does not follow."""


class OutputError(DovetailError):
    """An output that cannot be written, such as on a full disk; what an unfinished run has written is kept."""


class InUse(DovetailError):
    """Another process is writing to the same output."""


class CalibrationWarning(UserWarning):
    """A fallback of the calibration on one layer; the message names the layer and the reason."""
