"""``ssah demo``: a small model aligned, scored, grouped and ablated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.demo.full import run_full_demo
    from ssah.studies.demo.short import run_demo

__all__ = ["run_demo", "run_full_demo"]

__getattr__ = names_of(
    __name__,
    full="run_full_demo",
    short="run_demo",
)
