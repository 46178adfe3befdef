"""What a comparison reads and what it does: the settings of ``ssah compare``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import partial

from ssah.settings import setting
from ssah.studies.training.settings import TrainingSettings

_data = partial(setting, panel="Data")
_comparing = partial(setting, panel="Comparing")

ALL = "all"  # methods: each one that there is


@dataclass(frozen=True)
class CompareSets:
    """What a comparison reads; each as ``ssah.data.load_rows`` or ``load_requests`` takes it."""

    data: str = _data(MISSING, "Rows of the task that is trained on.")
    safety: str = _data("builtin:safety", "Harmful requests with refusals, to find parts by.")
    utility: str = _data("builtin:utility", "Instructions with answers, likewise.")
    requests: tuple[str, ...] = _data(
        ("builtin:safety_eval",),
        "Harmful requests, to measure; default: `builtin:safety_eval`; may be repeated.",
    )
    calibration: str | None = _data(
        None, "Harmful requests, to choose strengths by; default: a part of `--requests`."
    )
    utility_eval: str = _data("builtin:utility_eval", "Rows for utility loss and KL.")
    over_refusal: str = _data("builtin:overrefusal", "Harmless requests that look dangerous.")
    base: str | None = _data(
        None, "The model before alignment.", metavar="MODEL", option="--unaligned"
    )
    borderline: str | None = _data(
        None, "Harmless requests that look dangerous, for methods that need them to find something."
    )
    harmful: str | None = _data(None, "Your own harmful requests with harmful answers.")
    preferences: str | None = _data(
        None, "Rows with `prompt`, `chosen` and `rejected`.", metavar="FILE"
    )


@dataclass(frozen=True)
class CompareSettings(TrainingSettings):
    """What changes the result of a comparison, beside model and data."""

    methods: tuple[str, ...] = _comparing(
        (ALL,), "`ssah methods` lists them; may be repeated; default: all.", metavar="NAME"
    )
    set: tuple[str, ...] = _comparing(
        (),
        "Setting of a method, `sn-tune.share=0.1`; may be repeated; default: the paper's. A "
        "strength that is given, or a setting that stands in its place, is not swept.",
        metavar="METHOD.NAME=VALUE",
    )
    calibration_share: float = _comparing(
        0.25, "Share of the requests that is split off, without --calibration.", above=0, below=1
    )
    held_out: float = _comparing(
        0.2, "Share of the task that is measured, half to choose strengths by.", above=0, below=1
    )
    slack: float = _comparing(
        0.05, "Nats that a strength may add to the loss of the task, to be chosen.", min=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods is {' '.join(self.methods)!r}; it must have each once")
