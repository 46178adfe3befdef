"""How a fine-tune is checked: the settings and the data of ``ssah check``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ssah.choices import Counted, Normalize, Scope
from ssah.settings import setting
from ssah.studies.paired_models.settings import PairedSets, PairedSettings

_share = partial(setting, panel="Groups", min=0, max=1)


@dataclass(frozen=True)
class CheckSettings(PairedSettings):
    """How a fine-tune is checked."""

    repairs: bool = setting(True, "Measure also what putting weights back would give back.")
    interpolate: float = setting(
        0.5, "How far towards AFTER the interpolated model is.", above=0, below=1
    )
    scu: float = _share(0.008, "Share of all units.")
    ucu: float = _share(0.008, "Share of all units.")
    ru: float = _share(0.15, "Share of all units.")
    seed: int = setting(0, "Of random units and weights.", min=0)
    # As `ssah classify` has them by default; no options, as a check needs none.
    scope: Scope = "model"
    normalize: Normalize = "zscore"
    tokens: Counted = "labels"


@dataclass(frozen=True)
class CheckSets(PairedSets):
    """The rows that models are measured on, and those that units are scored on."""

    safety: str = setting("builtin:safety", "Scored for safety.", panel="Groups")
    utility: str = setting("builtin:utility", "Scored for utility.", panel="Groups")
