"""How the hidden states of two sets differ, from their sums alone.

With n rows, mean m, sum of squared deviations M2 (over all channels) and sum of unit vectors s of
each set, a and b:

    direction     d = m_a - m_b
    cosine a-a    (|s_a|^2 - n_a) / (n_a (n_a - 1))     mean over all pairs of different rows
    cosine a-b    s_a . s_b / (n_a n_b)                 mean over all pairs, one row of each
    gap           arccos(cosine a-b) - arccos(cosine a-a)                  radians
    ratio         |d|^2 / W,    W = (M2_a + M2_b) / (n_a + n_b - 2)
    silhouette    (B - A) / max(A, B), of each set, and their mean by rows
                  A = 2 M2_a / (n_a - 1)                mean squared distance of rows of one set
                  B = |d|^2 + M2_a / n_a + M2_b / n_b   mean squared distance between the sets

Example, of one channel: a = (0, 2), b = (4, 6). Then d = -4, W = (2 + 2) / 2 = 2 and the ratio 8;
A = 4, B = 16 + 1 + 1 = 18, as (16 + 36 + 4 + 16) / 4, and the silhouette is 14 / 18 = 0.78.

**The control.** Where both sets are drawn from one distribution, E|d|^2 = E[W] (1/n_a + 1/n_b): the
ratio is about 1/n_a + 1/n_b, and the silhouette about 0.

Sources: the gap, Li et al., arXiv 2408.17003 (which draws 500 pairs); the silhouette, Rousseeuw
1987 (which takes the mean after the quotient, of each row).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssah.representations.moments import Representations


def mean_difference(a: Representations, b: Representations) -> Tensor:
    """The direction from the mean of ``b`` to that of ``a``, of each position and layer.

    Returns:
        float64 ``[positions, layers, hidden]``. ``[0]`` of it is what ``Add(range(layers), ...)``
        and ``ProjectOut`` of `ssah.interventions` take.

    Raises:
        ValueError: the sets are of different positions or of models of another size.
    """
    _check(a, b, rows=1)
    return a.mean - b.mean


@dataclass(frozen=True, eq=False)
class PairCosines:
    """Mean cosines of pairs of rows, float64 ``[positions, layers]`` each.

    Attributes:
        within: both rows of the first set.
        other: both rows of the second set.
        between: one row of each.
    """

    within: Tensor
    other: Tensor
    between: Tensor

    @property
    def gap(self) -> Tensor:
        """By how much a row of the second set is farther than another one of the first.

        The angle of the mean cosines, in radians: float64 ``[positions, layers]``.
        """
        # Rounding may leave [-1, 1], where arccos has no value.
        between, within = (each.clamp(-1, 1).arccos() for each in (self.between, self.within))
        return between - within


def pair_cosines(a: Representations, b: Representations) -> PairCosines:
    """Mean cosines over all pairs of rows of two sets.

    Raises:
        ValueError: a set has fewer than two rows, or they do not fit each other.
    """
    _check(a, b, rows=2)
    # A row with itself has the cosine 1, and is no pair.
    within, other = (
        (each.unit_sum.square().sum(-1) - each.rows) / (each.rows * (each.rows - 1))
        for each in (a, b)
    )
    between = (a.unit_sum * b.unit_sum).sum(-1) / (a.rows * b.rows)
    return PairCosines(within, other, between)


@dataclass(frozen=True, eq=False)
class Separation:
    """How far apart two sets are, by the formulas above; float64 ``[positions, layers]`` each.

    Attributes:
        ratio: between over within, 0 or more.
        silhouette: from -1 to 1; above 0, a row is nearer to its own set.
        chance: the ratio that is expected of two sets of one distribution, a number.
    """

    ratio: Tensor
    silhouette: Tensor
    chance: float


def separation(a: Representations, b: Representations) -> Separation:
    """How far apart two sets are, of each position and layer.

    Raises:
        ValueError: a set has fewer than two rows, they do not fit each other, or all rows of each
            are alike at a position.
    """
    _check(a, b, rows=2)
    far = (a.mean - b.mean).square().sum(-1)  # [positions, layers]
    m2 = [each.m2.sum(-1) for each in (a, b)]
    within = (m2[0] + m2[1]) / (a.rows + b.rows - 2)
    if not bool((within > 0).all()):
        position, layer = (within <= 0).nonzero()[0].tolist()
        raise ValueError(
            f"all rows of each set are alike at position {a.positions[position]!r} of layer "
            f"{layer}; there must be some spread (a position that every template shares has none)"
        )
    between = far + m2[0] / a.rows + m2[1] / b.rows
    own = torch.stack([2 * m2[0] / (a.rows - 1), 2 * m2[1] / (b.rows - 1)])
    of_sets = (between - own) / torch.maximum(between, own)  # [2, positions, layers]
    silhouette = (a.rows * of_sets[0] + b.rows * of_sets[1]) / (a.rows + b.rows)
    return Separation(far / within, silhouette, 1 / a.rows + 1 / b.rows)


def _check(a: Representations, b: Representations, rows: int) -> None:
    if a.positions != b.positions or a.mean.shape != b.mean.shape:
        raise ValueError(
            f"a has the positions {list(a.positions)} and means {list(a.mean.shape)}, b has "
            f"{list(b.positions)} and {list(b.mean.shape)}; they must be equal"
        )
    if min(a.rows, b.rows) < rows:
        raise ValueError(f"a has {a.rows} rows and b {b.rows}; each must have {rows} at least")
