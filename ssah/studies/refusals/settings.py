"""What is called a refusal: the settings of ``ssah refusals``."""

from __future__ import annotations

from dataclasses import dataclass

from ssah.settings import check_settings, setting

MARGIN = "margin"  # in the place of a judge: the refusal margin of the request


@dataclass(frozen=True)
class RefusalSettings:
    """What changes the set, beside model and requests."""

    judges: tuple[str, ...] = setting(
        ("qi2023", MARGIN),
        "As of `ssah evaluate`, or `margin`: the refusal margin is above 0; of two kinds at least. "
        "May be repeated.",
        option="--judge",
    )
    max_new_tokens: int = setting(64, "Of an answer; one that is cut off is dropped.", min=1)
    batch_size: int = setting(16, "Requests answered at a time.", min=1)

    def __post_init__(self) -> None:
        check_settings(self)
