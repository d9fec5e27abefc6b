"""Studies: many runs side by side, as tables of quality and cost, and as curves."""

from dovetail.studies.report import StudyReport
from dovetail.studies.runner import study
from dovetail.studies.spec import Study

__all__ = ["Study", "StudyReport", "study"]
