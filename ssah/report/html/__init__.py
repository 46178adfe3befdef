"""The page of ``ssah report``: one HTML file with the tables and pictures of every run."""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.report.html.page import write_report

__all__ = ["write_report"]

__getattr__ = submodules_of(__name__)
