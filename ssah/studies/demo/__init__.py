"""``ssah demo``: a small model aligned, scored, grouped and ablated."""

from __future__ import annotations

from ssah.lazy import submodules_of

__getattr__ = submodules_of(__name__)
