"""What a run found: `report.json` as a checked record, and its pages for people."""

from typing import TYPE_CHECKING

from dovetail.lazy import lazy

if TYPE_CHECKING:
    from dovetail.report.page import page
    from dovetail.report.record import Checkpoint, Losses, Merge, Packed, Report, Row, Searched, TaskInfo
    from dovetail.report.summary import print_summary

__all__ = ["Checkpoint", "Losses", "Merge", "Packed", "Report", "Row", "Searched", "TaskInfo", "page", "print_summary"]

lazy(__name__, {"page": "page", "print_summary": "summary"} | dict.fromkeys(__all__[:-2], "record"))
