"""By what models are measured side by side: settings and data of ``protect`` and ``check``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ssah.settings import check_settings, setting
from ssah.studies.evaluate import answer_tokens

_measuring = partial(setting, panel="Measuring")
_data = partial(setting, panel="Data")


@dataclass(frozen=True)
class PairedSettings:
    """How models are measured side by side."""

    asr: int | None = _measuring(
        None, "Requests answered of each kind, the first ones; default: all.", min=1
    )
    judges: tuple[str, ...] = _measuring(
        ("wei2024",),
        "Of the answers, as `ssah evaluate` takes it; may be repeated: the first decides.",
        option="--judge",
    )
    max_new_tokens: int = answer_tokens(panel="Measuring")
    batch_size: int = _measuring(16, "Measured at a time.", min=1)
    max_length: int = _measuring(512, "Tokens kept of a row that is measured.", min=2)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class PairedSets:
    """The rows by which models are measured side by side."""

    requests: tuple[str, ...] = _data(
        ("builtin:safety_eval",),
        "Harmful: .txt, CSV, JSONL, `FILE[a:b]`, [`builtin:safety_eval`]; may be repeated.",
    )
    over_refusal: str = _data("builtin:overrefusal", "Harmless but dangerous-looking.")
    utility_eval: str = _data(
        "builtin:utility_eval", "Ordinary rows with answers, for utility loss and KL."
    )
