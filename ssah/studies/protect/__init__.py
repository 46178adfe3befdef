"""``ssah protect``: fine-tune an aligned model by a method, and measure it before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.protect.run import preview_protect, run_protect
    from ssah.studies.protect.settings import ProtectSets, ProtectSettings

__all__ = ["ProtectSets", "ProtectSettings", "preview_protect", "run_protect"]

__getattr__ = names_of(
    __name__,
    run="preview_protect run_protect",
    settings="ProtectSets ProtectSettings",
)
