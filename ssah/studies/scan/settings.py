"""What a scan measures: the settings of ``ssah scan``."""

from __future__ import annotations

from dataclasses import dataclass

from ssah.choices import Counted, Normalize, Scope
from ssah.settings import check_settings, setting
from ssah.studies.evaluate import answer_tokens


@dataclass(frozen=True)
class ScanSettings:
    """What a scan measures; shares are fractions of all units."""

    shares: tuple[float, ...] = setting(
        (0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032),
        "Of SCU and UCU.",
        panel="Groups",
        above=0,
        max=1,
    )
    ru_shares: tuple[float, ...] = setting(
        (0.05, 0.1, 0.15, 0.2, 0.3), "Of RU.", panel="Groups", above=0, max=1
    )
    scope: Scope = setting("model", "What is ranked together.", panel="Groups")
    normalize: Normalize = setting("zscore", "Scores of a module.", panel="Groups")
    tokens: Counted = setting("labels", "Positions scored; `labels`: response.", panel="Groups")
    compare: bool = setting(False, "All scopes x normalizations x tokens.", panel="Groups")
    compare_shares: tuple[float, ...] = setting(
        (0.004, 0.008, 0.016), "Of SCU, for that.", panel="Groups", above=0, max=1
    )
    tolerance: float = setting(0.15, "Nats of utility loss that may be lost.", min=0)
    safety_tolerance: float = setting(0.05, "Share of refusals that may be lost.", min=0)
    asr: int = setting(0, "Requests answered at each share; 0: none.", panel="Measuring", min=0)
    judges: tuple[str, ...] = setting(
        ("wei2024",),
        "Of the answers; may be repeated: the first decides.",
        option="--judge",
        panel="Measuring",
    )
    max_new_tokens: int = answer_tokens(panel="Measuring")
    draws: int = setting(1, "Sets of random units.", panel="Groups", min=1)
    seed: int = setting(0, "Of the random units.")
    batch_size: int = setting(16, "Measured at a time.", panel="Measuring", min=1)
    max_length: int = setting(512, "Tokens kept of a row.", panel="Measuring", min=2)

    def __post_init__(self) -> None:
        check_settings(self)
        # SCU and UCU are chosen from what RU leave, each with a share of its own.
        largest = max(self.ru_shares) + 2 * max(self.shares)
        if largest > 1:
            raise ValueError(
                f"the largest shares of RU, SCU and UCU are {largest:g} together; they must be at "
                "most 1"
            )
