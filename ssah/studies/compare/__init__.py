"""``ssah compare``: published methods side by side, each beside a control of its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.compare.verdicts import recommend, verdict

__all__ = ["recommend", "verdict"]

__getattr__ = names_of(
    __name__,
    verdicts="recommend verdict",
)
