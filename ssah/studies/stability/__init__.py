"""``ssah stability``: would other prompts have given the same groups?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.stability.run import run_stability
    from ssah.studies.stability.settings import StabilitySettings

__all__ = ["StabilitySettings", "run_stability"]

__getattr__ = names_of(
    __name__,
    run="run_stability",
    settings="StabilitySettings",
)
