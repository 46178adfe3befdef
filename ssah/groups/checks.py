"""What grouping is given: shares, choices and scores, each refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from ssah.choices import By, Group, Normalize, Scope
from ssah.units import UnitSet, split

GROUPS: tuple[str, ...] = get_args(Group)
SCOPES: tuple[str, ...] = get_args(Scope)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalize)
ORDERS: tuple[str, ...] = get_args(By)
SLACK = 1e-9  # shares such as 0.7 + 0.2 + 0.1 are not exact in binary


def fraction_of(argument: str, value: object) -> float:
    """A number from 0 to 1; TypeError for what is none, ValueError for another."""
    # True is an int to Python, and would be a share of 100 %.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} is {value!r}; it must be a fraction between 0 and 1")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{argument} is {value!r}; it must be a fraction between 0 and 1")
    return float(value)


def share_of(whole: str, text: str) -> float:
    """The number in ``text``: a share that stands in a name, as 0.06 in ``cu:0.06``.

    Args:
        whole: what the message begins with, e.g. ``"ablate is 'runs/groups:cu:few'"``.
        text: the share alone, e.g. ``"few"``. Its bounds are those of `UnitGroups.top`.

    Raises:
        ValueError: ``text`` is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{whole}: {text!r} must be a fraction of all units, a number in [0, 1]"
        ) from None


def sizes_of(scores: Mapping[str, Tensor]) -> dict[str, int]:
    """How many units each module has. ``scores``: B's name -> ``[n_units]``."""
    return {name: len(x) for name, x in scores.items()}


class Checked(dict[str, Tensor]):
    """Scores that were copied and looked at: 18 million of them need it once."""


def checked_scores(role: str, scores: Mapping[str, Tensor]) -> Checked:
    """Copies of scores, float64 [n_units] on the CPU.

    Raises:
        TypeError: scores that are no real numbers; the module is named.
        ValueError: no module, another shape, or a score that is NaN or infinite.
    """
    if isinstance(scores, Checked):
        return scores
    if not scores:
        raise ValueError(f"{role} has no modules; it must have scores for at least one")
    checked = Checked()
    for name, value in scores.items():
        # A copy: scores of the caller may share memory, or change later.
        try:
            given = torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{role}: the scores of {name} are {type(value).__name__}; they must be numbers"
            ) from error
        if given.is_complex():
            raise TypeError(f"{role}: the scores of {name} are complex; they must be real")
        x = given.detach().to("cpu", torch.float64, copy=True)  # [n_units]
        if x.dim() != 1 or len(x) == 0:
            raise ValueError(
                f"{role}: the scores of {name} have shape {list(x.shape)}; "
                "they must be one number per unit, [n_units]"
            )
        checked[name] = x
    # A sum that is finite has finite terms: one answer for all modules.
    if bool(torch.stack([x.sum() for x in checked.values()]).isfinite().all()):
        return checked
    # Sums of finite scores may overflow, so that all may be well after all.
    for name, x in checked.items():
        bad = int((~x.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{role}: {bad} of {len(x)} scores of {name} are NaN or infinite; "
                "every score must be finite"
            )
    return checked


def check_same_modules(
    left_name: str, left: Mapping[str, int], right_name: str, right: Mapping[str, int]
) -> None:
    """Raise ValueError unless two results are of the same modules, with as many units each."""
    # Both ways round: each may have modules that the other lacks.
    for here, there, a, b in (
        (left_name, right_name, left, right),
        (right_name, left_name, right, left),
    ):
        missing = [name for name in a if name not in b]
        if missing:
            raise ValueError(
                f"{there} lacks {len(missing)} of the modules of {here}, {missing[0]} for one; "
                "both must cover the same modules"
            )
    for name, n in left.items():
        if right[name] != n:
            raise ValueError(
                f"{name} has {n} units in {left_name} and {right[name]} in {right_name}; "
                "both must be of the same model"
            )


def labels_of(groups: Mapping[str, UnitSet], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The group of every unit: B's name -> uint8 ``[n_units]``, positions in `GROUPS`.

    Raises:
        ValueError: a unit is in no group, or in several; the first one is named.
    """
    times = torch.zeros(sum(sizes.values()), dtype=torch.uint8)  # [units]: how many groups have it
    labels = torch.zeros_like(times)
    for number, group in enumerate(GROUPS):
        mask = groups[group].over(sizes)  # bool [units], all modules in one row
        times += mask
        labels[mask] = number
    wrong = (times != 1).nonzero()[:, 0]  # [units that are wrong], in the row of all
    if len(wrong):
        of = split(wrong[:1], [*sizes], sizes)
        name = next(name for name, index in of.items() if len(index))
        raise ValueError(
            f"unit {int(of[name])} of {name} is in {int(times[wrong[0]])} groups; "
            f"each of its {sizes[name]} units must be in exactly one"
        )
    return dict(zip(sizes, labels.split([*sizes.values()]), strict=True))
