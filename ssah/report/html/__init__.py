"""The page of ``ssah report``: one HTML file with the tables and pictures of every run."""

from __future__ import annotations

from ssah.lazy import submodules_of

__getattr__ = submodules_of(__name__)
