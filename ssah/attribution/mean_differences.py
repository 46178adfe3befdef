"""By how much the mean activation of a unit differs between two data sets, beside its spread.

Of n tokens of each set, a and b, with means m and unbiased variances v of what enters B:

    shift        m_a - m_b
    effect size  d = (m_a - m_b) / s,   s^2 = ((n_a - 1) v_a + (n_b - 1) v_b) / (n_a + n_b - 2)

Example: activations (1, 3) and (5, 7, 9). The means are 2 and 7, s^2 = (2 + 8) / 3, and d = -5 /
1.83 = -2.74. Source: Cohen 1988, section 2.2 (d with pooled standard deviation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssah.attribution.result import Attribution


def mean_shifts(a: Attribution, b: Attribution) -> dict[str, Tensor]:
    """Mean activation on the first set less that on the second one.

    Returns:
        B's name -> float64 ``[n_units]``. Of an expert that a set has not reached it is 0.

    Raises:
        ValueError: the two are of different units, or of other tokens.
    """
    _check(a, b)
    return {
        name: a.mean[name] - b.mean[name]
        if a.count[name] and b.count[name]
        else torch.zeros_like(a.mean[name])
        for name in a.mean
    }


def effect_sizes(a: Attribution, b: Attribution) -> dict[str, Tensor]:
    """The same in pooled standard deviations.

    Returns:
        B's name -> float64 ``[n_units]``; 0 for a unit that varies in neither set.

    Raises:
        ValueError: the two are of different units, or of other tokens.
    """
    shifts = mean_shifts(a, b)
    return {name: _pooled(shift, a, b, name) for name, shift in shifts.items()}


def _pooled(shift: Tensor, a: Attribution, b: Attribution, name: str) -> Tensor:
    # Of a single token there is no variance, and no deviation either.
    squares = [
        (each.count[name] - 1) * each.variance[name] for each in (a, b) if each.count[name] > 1
    ]
    if not squares:
        return torch.zeros_like(shift)
    deviation = (sum(squares) / (a.count[name] + b.count[name] - 2)).sqrt()  # type: ignore[union-attr]
    # Where nothing varies, no number of deviations makes the shift.
    return torch.where(deviation > 0, shift / deviation, 0.0)


def _check(a: Attribution, b: Attribution) -> None:
    sizes = [{name: len(mean) for name, mean in each.mean.items()} for each in (a, b)]
    if sizes[0] != sizes[1] or a.tokens != b.tokens:
        raise ValueError(
            f"a is of {sum(sizes[0].values())} units and {a.tokens!r} tokens, b of "
            f"{sum(sizes[1].values())} and {b.tokens!r}; they must be of the same units and kind "
            "of tokens: score both on one model with one `tokens`"
        )
