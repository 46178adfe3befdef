"""Subspaces of R^n, given by an orthonormal basis Q ``[n, rank]``: P = Q Q^T projects onto it.

All is float64. P P = P, and P x + (I - P) x = x. Example: Q = (1, 1) / sqrt 2 spans the diagonal of
the plane; of x = (3, 1) the part in it is (2, 2), and the part away from it is (1, -1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssah.deltas.subspaces.gram_matrices import Gram


@dataclass(frozen=True, eq=False)
class Subspace:
    """A subspace.

    Attributes:
        basis: float64 ``[n, rank]``, orthonormal columns, the most important first.

    Raises:
        ValueError: the basis is not of this form.
    """

    basis: Tensor

    def __post_init__(self) -> None:
        if self.basis.dim() != 2 or self.basis.dtype != torch.float64:
            raise ValueError(
                f"basis is {self.basis.dtype} {list(self.basis.shape)}; it must be torch.float64 "
                "[n, rank]: Subspace.spanned_by(vectors) makes one"
            )
        unit = torch.eye(self.rank, dtype=torch.float64, device=self.basis.device)
        if not torch.allclose(self.basis.T @ self.basis, unit, rtol=0, atol=1e-10):
            raise ValueError(
                "basis has columns that are not orthonormal; Subspace.spanned_by(vectors) makes "
                "them so"
            )

    @classmethod
    def spanned_by(cls, vectors: Tensor, rank: int | None = None) -> Subspace:
        """The directions in which the columns of ``vectors`` ``[n, k]`` are largest.

        Args:
            vectors: of any floating dtype.
            rank: how many; by default all that the columns span (singular values above n eps of
                the largest).

        Raises:
            ValueError: the columns do not span as many, or none.
        """
        if vectors.dim() != 2:
            raise ValueError(f"vectors is {list(vectors.shape)}; it must be [n, k]")
        u, s, _ = torch.linalg.svd(vectors.detach().double(), full_matrices=False)
        eps = torch.finfo(vectors.dtype).eps  # what the vectors were rounded to
        spanned = int((s > s.max() * max(vectors.shape) * eps).sum()) if s.numel() else 0
        if not 0 < (spanned if rank is None else rank) <= spanned:
            raise ValueError(
                f"rank is {rank}; it must be from 1 to {spanned}, which the vectors span"
            )
        return cls(u[:, : spanned if rank is None else rank].contiguous())

    @classmethod
    def random(cls, n: int, rank: int, seed: int = 0) -> Subspace:
        """A subspace drawn uniformly: the control of every overlap.

        Raises:
            ValueError: ``rank`` is not from 1 to ``n``.
        """
        if not 1 <= rank <= n:
            raise ValueError(f"rank is {rank}; it must be from 1 to {n}")
        # A Gaussian prefers no direction, so that what it spans is uniform.
        generator = torch.Generator().manual_seed(seed)
        return cls.spanned_by(torch.randn(n, rank, generator=generator, dtype=torch.float64))

    @property
    def n(self) -> int:
        """Dimension of the space."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Dimension of the subspace."""
        return self.basis.shape[1]

    @property
    def projector(self) -> Tensor:
        """P, float64 ``[n, n]``."""
        return self.basis @ self.basis.T

    def onto(self, x: Tensor, dim: int = -1) -> Tensor:
        """The part of ``x`` in the subspace: ``[...]`` in the dtype of ``x``, rounded once.

        Args:
            x: of size n along ``dim``: a weight ``[out, in]`` with ``dim=0`` is projected in what
                it puts out, with ``dim=1`` in what it reads.
            dim: which dimension is the space.

        Raises:
            ValueError: another size.
        """
        return self._part(x, dim).to(x.dtype)

    def away(self, x: Tensor, dim: int = -1) -> Tensor:
        """What is left of ``x`` ``[..., n, ...]`` without its part in the subspace; see `onto`."""
        return (x.double() - self._part(x, dim)).to(x.dtype)

    def _part(self, x: Tensor, dim: int) -> Tensor:
        if x.shape[dim] != self.n:
            raise ValueError(f"x has size {x.shape[dim]} along {dim}; it must be {self.n}")
        basis = self.basis.to(x.device)
        rows = x.detach().double().movedim(dim, -1)  # [..., n]
        # Two thin products: the projector itself may be larger than x.
        return (rows @ basis @ basis.T).movedim(-1, dim)


def output_subspace(weight: Tensor, of: Gram, rank: int) -> Subspace:
    """The ``rank`` directions in which W X is largest: leading eigenvectors of W G W^T.

    To project a weight on them is the best approximation of rank ``rank`` of what the projection
    puts out on these inputs.

    Args:
        weight: W ``[out, in]``; of a Conv1D its transpose.
        of: the Gram matrix of its input.
        rank: from 1 to ``out``.

    Raises:
        ValueError: the sizes do not fit, or ``rank`` is none.

    Source: Wei et al. 2024, arXiv 2402.05162 (ActSVD).
    """
    if weight.dim() != 2 or weight.shape[1] != len(of.matrix):
        raise ValueError(
            f"weight is {list(weight.shape)}; it must be [out, {len(of.matrix)}] for this matrix"
        )
    if not 1 <= rank <= len(weight):
        raise ValueError(f"rank is {rank}; it must be from 1 to {len(weight)}")
    w = weight.detach().double().cpu()
    vectors = torch.linalg.eigh(w @ of.matrix @ w.T).eigenvectors  # [out, out], ascending
    return Subspace(vectors[:, -rank:].flip(1).contiguous())


def delta_subspace(base: Tensor, tuned: Tensor, rank: int, *, dim: int = 0) -> Subspace:
    """The ``rank`` directions in which training changed a weight most: singular vectors of it.

    Args:
        base, tuned: the weight ``[out, in]`` before and after.
        rank: how many.
        dim: 0 for directions of the output, 1 for those of the input.

    Raises:
        ValueError: the shapes differ; ``rank`` is not from 1 to the rank of the change.
    """
    if base.shape != tuned.shape or base.dim() != 2 or dim not in (0, 1):
        raise ValueError(
            f"base is {list(base.shape)}, tuned is {list(tuned.shape)} and dim is {dim}; they must "
            "be [out, in] of one shape, and dim 0 or 1"
        )
    delta = tuned.detach().double() - base.detach().double()
    return Subspace.spanned_by(delta if dim == 0 else delta.T, rank)
