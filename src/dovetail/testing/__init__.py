"""Tests for links of other packages."""

from dovetail.testing.contract import check_link

__all__ = ["check_link"]
