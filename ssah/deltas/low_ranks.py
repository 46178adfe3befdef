"""The low-rank part of a delta: the matrix of rank r that is nearest to it.

With the singular value decomposition D = U S V^T of a matrix [m, n] it is U_r S_r V_r^T, from the r
largest singular values (Eckart & Young 1936), and that is D V_r V_r^T. So only V_r is computed: the
leading eigenvectors of D^T D, or of D D^T if that is smaller. Both products and eigenvectors are
in float64; D^T D is added up over blocks of rows, and D itself is never in memory in float64.
Example: D = [[3, 0], [0, 1]] has D^T D = [[9, 0], [0, 1]], V_1 = (1, 0), and the rank-1 part
[[3, 0], [0, 0]].

What D^T D loses: a singular value below 1e-8 of the largest one is rounded away, which is less than
float32 weights can tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ssah.deltas.arithmetic import add, blocks, delta_of
from ssah.deltas.matching import Deltas
from ssah.deltas.results import Out, finished
from ssah.deltas.weights import WeightsOf

BLOCK = 1 << 22  # elements of a block of rows: enough for a product to run at full speed


def low_rank(
    base: WeightsOf, tuned: WeightsOf, rank: int, *, out: Out = None
) -> Path | dict[str, Tensor]:
    """The base with what training changed, as far as ``rank`` singular directions have it.

    Every matrix has its own; of a tensor with more than two dimensions, each matrix of the last
    two. Vectors (norms, biases) are those of ``tuned``. A matrix of 4096 x 4096 takes one or two
    minutes on one core: nothing is approximated.

    Args:
        base, tuned, out: as of `ssah.deltas.interpolate`.
        rank: 1 or more; from the smaller side of a matrix on all of its change is kept.

    Returns:
        ``out``; or for models in memory a state dict on the CPU, name -> ``[...]``.

    Raises:
        ValueError: ``rank`` is below 1; other errors as of `ssah.deltas.interpolate`.

    Source: Eckart & Young 1936: the singular value decomposition, cut, is the nearest of a rank.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be 1 or more")
    deltas = Deltas(base, [tuned])
    edit = {"edit": "low_rank", "rank": rank}
    return finished(deltas, out, edit, lambda: partial(_make, deltas, rank))


def _make(deltas: Deltas, rank: int, name: str) -> Tensor:
    before, (after,) = deltas.read(name)
    if not deltas.in_float(name) or after.dim() < 2 or min(after.shape[-2:]) <= rank:
        return after
    result = torch.empty_like(after)
    for out, b, t in zip(*map(_matrices, (result, before, after)), strict=True):
        leading = leading_vectors(name, b, t, rank)
        # The delta once more, block by block: whole, in float64, it takes four times the weights.
        for rows in blocks(b, BLOCK):
            delta = delta_of(name, b[rows], t[rows])
            change = delta @ leading @ leading.T
            add(out[rows], b[rows], [t[rows]], [delta], change)
    return result


def leading_vectors(name: str, base: Tensor, tuned: Tensor, rank: int) -> Tensor:
    """V_r of the delta: float64 ``[n, rank]`` of matrices ``[m, n]``, m at least n.

    Raises:
        FloatingPointError: an element is NaN or infinite.
    """
    gram = torch.zeros(base.shape[1], base.shape[1], dtype=torch.float64)
    for rows in blocks(base, BLOCK):
        delta = delta_of(name, base[rows], tuned[rows])
        gram.addmm_(delta.T, delta)
    # Eigenvalues ascend: the leading vectors are the last ones.
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:]


def _matrices(tensor: Tensor) -> Iterator[Tensor]:
    """Each matrix of ``[..., m, n]`` as a view ``[long side, short side]``."""
    for matrix in tensor.flatten(0, -3) if tensor.dim() > 2 else tensor[None]:
        yield matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
