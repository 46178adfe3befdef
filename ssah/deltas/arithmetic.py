"""One tensor of a result: some of every delta kept and scaled, all of them combined, and added.

With b the base, t_i a tuned model, d_i = t_i - b its delta, and m_i in {0, 1} what is kept of it:

    k_i = w_i m_i d_i / s                 s is the share that is kept where kept is rescaled, else 1
    c   = sum_i k_i                       "sum"    task arithmetic (Ilharco et al. 2022, 2212.04089)
          sum_i k_i / n                   "mean"
          mean of the k_i with the sign   "ties"   TIES (Yadav et al. 2023, 2306.01708)
          of sum_i k_i, zeros left out
    r   = b + c

Interpolation (WiSE-FT, Wortsman et al. 2021, 2109.01903) is the sum of one delta with w = alpha.
Random m with a rescaled rest is DARE (Yu et al. 2023, 2311.03099). Example, b = 1 and the deltas
0.25, 0.125 and -0.25, all kept, all scaled by 2 to 0.5, 0.25 and -0.5: the sum is 0.25 and the mean
0.083; TIES elects the sign +, and takes the mean of 0.5 and 0.25, which is 0.375. The results are
1.25, 1.083 and 1.375.

All is computed in float64 and rounded once. An element whose change comes out as 0 has the bits of
the base, and one whose change is a whole delta has the bits of that tuned model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ssah.choices import Combine

CHUNK = 1 << 16  # elements: half a megabyte in float64, which a processor's cache holds


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape ``[...]`` as pieces ``[n]`` of at most CHUNK elements.

    A piece of a contiguous tensor is a view.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), CHUNK):
        yield tuple(each[start : start + CHUNK] for each in flat)


def blocks(tensor: Tensor, elements: int) -> Iterator[slice]:
    """Rows of a tensor ``[rows, ...]``, so many that they have about so many elements together."""
    step = max(1, elements * len(tensor) // max(1, tensor.numel()))
    return (slice(start, start + step) for start in range(0, len(tensor), step))


def delta_of(name: str, base: Tensor, tuned: Tensor) -> Tensor:
    """``tuned - base``, float64 ``[...]``, of a piece ``[...]`` of the tensor ``name``.

    Raises:
        FloatingPointError: it has NaN or infinite elements.
    """
    delta = tuned.double() - base.double()
    # The sum is NaN or infinite if any element is: one pass, and no mask.
    if not bool(delta.sum().isfinite()):
        raise FloatingPointError(
            f"the tensor {name!r} is NaN or infinite in the base or in a tuned model: training "
            "diverged, or a file is damaged"
        )
    return delta


def combined(kept: Sequence[Tensor], how: Combine) -> Tensor:
    """What was kept of each delta as one change: float64 ``[n]``, as each of ``kept``."""
    total = kept[0] if len(kept) == 1 else torch.stack(list(kept)).sum(0)
    if how == "sum":
        return total
    if how == "mean":
        return total / len(kept)
    agreed, n = torch.zeros_like(total), torch.zeros_like(total)
    for each in kept:
        agrees = (each.sign() == total.sign()) & (each != 0)
        agreed += each * agrees
        n += agrees
    return agreed / n.clamp(min=1)


def added(
    base: Tensor,
    tuned: Sequence[Tensor],
    change: Callable[[list[Tensor]], Tensor],
    name: str,
) -> Tensor:
    """A tensor of the result, ``[...]`` in the dtype of the first tuned model.

    Args:
        base, tuned: the tensor ``[...]`` in each model.
        change: gives what to add, float64 ``[n]``, for the deltas of a piece; called from the front
            of the tensor to its back.
        name: of the tensor, for messages.
    """
    result = torch.empty(tuned[0].shape, dtype=tuned[0].dtype)
    for out, b, *ts in chunks(result, base, *tuned):
        deltas = [delta_of(name, b, t) for t in ts]
        add(out, b, ts, deltas, change(deltas))
    return result


def add(
    out: Tensor, base: Tensor, tuned: Sequence[Tensor], deltas: Sequence[Tensor], change: Tensor
) -> None:
    """Write ``base + change``, rounded once, to ``out``; all are ``[...]`` of one shape."""
    result = torch.where(change == 0, base.to(out.dtype), (base.double() + change).to(out.dtype))
    for delta, t in zip(deltas, tuned, strict=True):
        # Rounding b + (t - b) need not give t back.
        result = torch.where(change == delta, t.to(out.dtype), result)
    out.copy_(result)
