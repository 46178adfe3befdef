"""What subspaces share, always beside what a random subspace of the same rank would share.

The overlap of A and B, with orthonormal bases [n, r] and [n, k], is ||A^T B||^2 / min(r, k): the
mean squared cosine of their principal angles. The energy of a matrix M in A is ||A^T M||^2 /
||M||^2. Example: in three dimensions the plane of x and y and the plane of y and z share y. Their
angles are 0 and 90 degrees, and the overlap is 1/2.

**The control.** For a uniformly random projector P of rank r on R^n and a positive S,

    mean tr(P S) = r tr(S) / n
    var  tr(P S) = 2 r (n - r) (n tr(S^2) - tr(S)^2) / (n^2 (n - 1) (n + 2))

so nothing is drawn. Two planes in R^3 overlap by 2/3 on average: only what is above is shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from ssah.deltas.subspaces.bases import Subspace


@dataclass(frozen=True)
class Share:
    """A share in [0, 1], and its controls.

    Attributes:
        value: what was asked.
        random: the mean of it for random subspaces of the same rank.
        random_sd: the standard deviation over these.
        utility: the same for the subspace that was given as the other control; None without one.
    """

    value: float
    random: float
    random_sd: float
    utility: float | None = None


def principal_angles(a: Subspace, b: Subspace) -> Tensor:
    """The angles between two subspaces of one space: float64 ``[min(ranks)]``, radians, ascending.

    Accurate for small angles too (Knyazev & Argentati 2002; scipy's ``subspace_angles``).

    Raises:
        ValueError: they are of different spaces.
    """
    _check_one_space(a, b)
    angles = scipy.linalg.subspace_angles(a.basis.cpu().numpy(), b.basis.cpu().numpy())
    return torch.from_numpy(angles.copy()).flip(0)


def overlap(a: Subspace, b: Subspace, *, utility: Subspace | None = None) -> Share:
    """How much two subspaces share: the mean squared cosine of their principal angles.

    Args:
        a: the one; random subspaces have its rank.
        b: the other.
        utility: one that is measured in the place of ``a``, as a second control; cut to the rank
            of ``a`` if it has more.

    Raises:
        ValueError: they are of different spaces, or ``utility`` has a smaller rank than ``a``.
    """
    _check_one_space(a, b)
    return _share(a, b.basis, 1 / min(a.rank, b.rank), utility)


def energy(matrix: Tensor, subspace: Subspace, *, utility: Subspace | None = None) -> Share:
    """The share of ||matrix||^2 that lies in a subspace.

    Args:
        matrix: ``[n, m]``: its columns are in the space. For the inputs of a weight ``[out, in]``
            pass its transpose.
        subspace: of R^n.
        utility: as of `overlap`.

    Raises:
        ValueError: ``matrix`` has another size, or is 0.
    """
    if matrix.dim() != 2 or len(matrix) != subspace.n:
        raise ValueError(f"matrix is {list(matrix.shape)}; it must be [{subspace.n}, m]")
    m = matrix.detach().double()
    total = float(m.square().sum())
    if total == 0:
        raise ValueError("matrix is 0: it has no energy that could lie in a subspace")
    return _share(subspace, m, 1 / total, utility)


def _share(of: Subspace, matrix: Tensor, scale: float, utility: Subspace | None) -> Share:
    """``scale`` ||Q^T matrix||^2 for the basis Q of ``of``, and the same of the controls."""
    if utility is not None:
        _check_one_space(of, utility)
        if utility.rank < of.rank:
            raise ValueError(f"utility has rank {utility.rank}; it must have at least {of.rank}")
    n, r = of.n, of.rank
    m = matrix.to(of.basis.device)
    # The smaller of M M^T and M^T M: both have the traces that are needed.
    square = m.T @ m if m.shape[1] < m.shape[0] else m @ m.T
    trace, trace_sq = float(square.trace()), float(square.square().sum())
    spread = max(0.0, n * trace_sq - trace**2)  # 0 where all directions are alike
    variance = 2 * r * (n - r) * spread / (n**2 * (n - 1) * (n + 2)) if n > 1 else 0.0
    # A control of the same rank: the leading directions of the other subspace.
    bases = [of.basis] if utility is None else [of.basis, utility.basis[:, :r]]
    found = [scale * float((basis.T @ m).square().sum()) for basis in bases]
    return Share(found[0], scale * r * trace / n, scale * math.sqrt(variance), *found[1:])


def _check_one_space(a: Subspace, b: Subspace) -> None:
    if a.n != b.n:
        raise ValueError(f"subspaces are of R^{a.n} and R^{b.n}; they must be of one space")
