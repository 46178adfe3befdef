"""``ssah check``: did a fine-tune damage safety, where does it lie, and what would undo it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.check.run import run_check
    from ssah.studies.check.settings import CheckSets, CheckSettings

__all__ = ["CheckSets", "CheckSettings", "run_check"]

__getattr__ = names_of(
    __name__,
    run="run_check",
    settings="CheckSets CheckSettings",
)
