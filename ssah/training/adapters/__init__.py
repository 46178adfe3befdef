"""Adapters that leave chosen units as they are, and updates that are written as adapters."""

from __future__ import annotations

from ssah.lazy import submodules_of

__getattr__ = submodules_of(__name__)
