"""What grouping is given: shares, choices and scores, each refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Checked", "check_same_modules", "checked_scores", "choice", "fraction_of"]


def choice(argument: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument} is {value!r}; it must be one of {', '.join(allowed)}")


def fraction_of(argument: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} is {value!r}; it must be a fraction between 0 and 1")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{argument} is {value!r}; it must be a fraction between 0 and 1")
    return float(value)


class Checked(dict[str, Tensor]):
    """Scores that were copied and looked at: 18 million of them need it once."""


def checked_scores(role: str, scores: Mapping[str, Tensor]) -> Checked:
    """Copies of scores, float64 [n_units] on the CPU; refuses unusable ones by name."""
    if isinstance(scores, Checked):
        return scores
    if not scores:
        raise ValueError(f"{role} has no modules; it must have scores for at least one")
    checked = Checked()
    for name, value in scores.items():
        # a copy: scores of the caller may share memory, or change later
        try:
            given = torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{role}: the scores of {name} are {type(value).__name__}; they must be numbers"
            ) from error
        if given.is_complex():
            raise TypeError(f"{role}: the scores of {name} are complex; they must be real")
        x = given.detach().to("cpu", torch.float64, copy=True)
        if x.dim() != 1 or len(x) == 0:
            raise ValueError(
                f"{role}: the scores of {name} have shape {list(x.shape)}; "
                "they must be one number per unit, [n_units]"
            )
        checked[name] = x
    # A sum that is finite has finite terms: one answer for all modules.
    if bool(torch.stack([x.sum() for x in checked.values()]).isfinite().all()):
        return checked
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
