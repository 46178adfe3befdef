"""What is measured of the prompts' influence: the settings of ``ssah stability``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ssah.choices import Counted, Normalize, Scope
from ssah.settings import check_settings, setting

_grouping = partial(setting, panel="Groups")
_share = partial(_grouping, help="Share of all units, above 0.", above=0, max=1)


@dataclass(frozen=True)
class StabilitySettings:
    """What is measured; twice the largest size of different prompts must be there."""

    sizes: tuple[int, ...] = setting(
        (16, 32, 64, 128), "Prompts of each set; default: 16 32 64 128.", min=1
    )
    resamples: int = setting(20, "Pairs of draws at each size.", min=1)
    enough: float = setting(0.7, "Overlap from which on prompts suffice.", above=0, below=1)
    scu: float = _share(0.01)
    ucu: float = _share(0.01)
    ru: float = _share(0.15)
    scope: Scope = _grouping("model", "What is ranked together.")
    normalize: Normalize = _grouping("zscore", "Scores of a module.")
    tokens: Counted = _grouping("labels", "Positions scored; `labels`: response.")
    seed: int = setting(0, "Of the draws.", min=0)
    max_length: int = setting(512, "Tokens kept of a row.", panel="Measuring", min=2)

    def __post_init__(self) -> None:
        check_settings(self)
