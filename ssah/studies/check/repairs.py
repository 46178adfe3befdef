"""What would undo a fine-tune's damage: weights put back, each beside a control of the same size.

With b the model before and t the one after:

    rewound        b for what SCU own, t else        control: as many random units of each module
    interpolated   b + alpha (t - b)                 control: a random share alpha^2 of t - b

Example: b = 1 and t = 3 of a weight that an SCU owns: rewound it is 1, and half way 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssah.deltas import interpolate, keep, rewind
from ssah.units import UnitSet

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from ssah.studies.check.settings import CheckSettings

    Made = Path | dict[str, Tensor]


N_REPAIRS = 4  # controls among them


@dataclass(frozen=True)
class Repair:
    """A way to undo the damage of a fine-tune.

    Attributes:
        label: what it does, in a few words.
        make: given the models before and after in memory, the state of the repaired one.
        control: name of the repair of the same size that is its control; None: it is one.
    """

    label: str
    make: Callable[[PreTrainedModel, PreTrainedModel], Made]
    control: str | None = None


def repairs(scu: UnitSet, settings: CheckSettings) -> dict[str, Repair]:
    """The repairs by name, each followed by its control."""
    alpha, seed = settings.interpolate, settings.seed
    drawn = UnitSet.random(scu, seed=seed)
    return {
        "rewound": Repair("SCU put back", lambda b, t: rewind(b, t, scu), "random"),
        "random": Repair("  as many random", lambda b, t: rewind(b, t, drawn)),
        "interpolated": Repair(
            f"{alpha:g} of the change", lambda b, t: interpolate(b, t, alpha), "share"
        ),
        "share": Repair(
            f"  random {alpha**2:.3g} of it",
            lambda b, t: keep(b, t, alpha**2, by="random", seed=seed),
        ),
    }


def repair_sentence(repair: Repair, changed: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    """What a repair gives back.

    Args:
        repair: which one.
        changed: ``asr`` and ``utility_loss`` of the repaired model, less those of the model after.
        beside: the same, less those of its control.
    """
    loss = changed["utility_loss"]["value"]
    return (
        f"{repair.label}: the ASR is {_points(changed['asr'])} beside the model after, and "
        f"{_points(beside['asr'])} beside its control; utility loss {loss:+.3f} nats."
    )


def _points(difference: Mapping[str, Any]) -> str:
    value, low, high = (100 * each for each in (difference["value"], *difference["interval"]))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
