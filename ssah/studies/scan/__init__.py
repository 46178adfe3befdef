"""``ssah scan``: which units, how many of them, and by which way of grouping."""

from __future__ import annotations

from ssah.lazy import submodules_of

__getattr__ = submodules_of(__name__)
