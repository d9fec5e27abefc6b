"""Studies: many runs beside each other, as tables of quality and cost, and as curves."""

from dovetail.study.matrix import Study
from dovetail.study.record import StudyReport
from dovetail.study.runner import study

__all__ = ["Study", "StudyReport", "study"]
