"""``ssah bench``: every operator and ``attribute`` on this machine, beside PyTorch."""

from __future__ import annotations

from ssah.lazy import submodules_of

__getattr__ = submodules_of(__name__)
