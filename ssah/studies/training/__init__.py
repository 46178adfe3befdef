"""Studies that train one model in several ways to equal training loss."""

from __future__ import annotations

from ssah.lazy import submodules_of

__getattr__ = submodules_of(__name__)
