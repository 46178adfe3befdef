"""Device side of the moments: shifted sums of a tile, a chunk's (n, mean, M2), Chan's merge."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssah_kernels.backends.triton.device import store_row
from ssah_kernels.backends.triton.launch import MERGE_CHANNELS, MERGE_CHUNKS, Launch


@triton.jit
def tile_sums(v, valid, n, centre, s1, s2):
    """Add a tile [DEPTH, WARPS, BLOCK] to each warp's count and shifted sums [WARPS, BLOCK].

    v is 0 where ``valid`` [DEPTH, WARPS, 1] is not. The shift is the mean of the warp's first tile
    that has a row: M2 = s2 - s1^2 / n then cancels by at most 1 + tiles, whatever the data (the sum
    of squares about a mean of R of the n rows is at most (1 + n / R) M2).
    """
    # Summed as a pair, so that the count, too, has the layout of the loads: no exchange of data.
    pair = tl.join(tl.broadcast_to(valid, v.shape).to(v.dtype), v)
    n_tile, sum_tile = tl.split(tl.sum(pair, 0))
    centre = tl.where(n > 0, centre, sum_tile / tl.maximum(n_tile, 1))
    d = tl.where(valid, v - centre[None, :, :], 0)
    return n + n_tile, centre, s1 + tl.sum(d, 0), s2 + tl.sum(d * d, 0)


@triton.jit
def store_moments(n, centre, s1, s2, chunk, cols, channels, partial_ptr, BLOCK: tl.constexpr):
    """Merge the warps' moments into partial [chunks, 2, channels] (mean, M2); returns the count.

    Means are handled as distances from one centre: float32 then loses nothing to a large mean, and
    half the registers of float64 are needed.
    """
    total = tl.sum(n, 0)  # [BLOCK]
    inverse = 1 / tl.maximum(total, 1)
    origin = tl.sum(n * centre, 0) * inverse
    shift = s1 / tl.maximum(n, 1)  # [WARPS, BLOCK]
    distance = tl.where(n > 0, (centre - origin[None, :]) + shift, 0)
    mean = tl.sum(n * distance, 0) * inverse
    deviation = tl.where(n > 0, distance - mean[None, :], 0)
    m2 = tl.sum((s2 - s1 * shift) + n * (deviation * deviation), 0)
    row = partial_ptr + chunk * 2 * channels
    store_row(row, cols, origin.to(tl.float64) + mean.to(tl.float64), channels, BLOCK)
    store_row(row + channels, cols, m2, channels, BLOCK)
    return tl.max(total, 0)


@triton.jit
def merge(n, mean, m2, n_b, mean_b, m2_b):
    """Chan's merge of (n, mean, M2) with (n_b, mean_b, m2_b)."""
    weight = n_b / tl.maximum(n + n_b, 1)
    delta = tl.where(n_b > 0, mean_b - mean, 0)
    return n + n_b, mean + delta * weight, m2 + m2_b + delta * delta * (n * weight)


@triton.jit
def merge_moments_kernel(
    partial_ptr, counts_ptr, count_ptr, mean_ptr, m2_ptr, chunks, channels,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stage 2: merge partial [chunks, 2, channels] and counts [1 + chunks] into the state."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < channels
    before = tl.load(counts_ptr)  # the state's count, which another program may be writing
    n = before * 0
    mean = tl.zeros((BLOCK,), tl.float64)
    m2 = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        here = (chunk < chunks)[:, None] & inside[None, :]
        row = partial_ptr + chunk[:, None].to(tl.int64) * 2 * channels + cols[None, :]
        n_b = tl.load(counts_ptr + 1 + chunk, mask=chunk < chunks, other=0)[:, None]
        mean_b = tl.load(row, mask=here, other=0)
        m2_b = tl.load(row + channels, mask=here, other=0)
        total = tl.sum(tl.sum(n_b, 1), 0)
        centre = tl.sum(n_b * mean_b, 0) / tl.maximum(total, 1)
        deviation = mean_b - centre[None, :]
        m2_b = tl.sum(m2_b + n_b * (deviation * deviation), 0)
        n, mean, m2 = merge(n, mean, m2, total, centre, m2_b)
    mean_0 = tl.load(mean_ptr + cols, mask=inside, other=0)
    m2_0 = tl.load(m2_ptr + cols, mask=inside, other=0)
    n, mean, m2 = merge(before, mean_0, m2_0, n, mean, m2)
    tl.store(mean_ptr + cols, mean, mask=inside)
    tl.store(m2_ptr + cols, m2, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, n)


def merge_launch(
    partial: Tensor, counts: Tensor, count: Tensor, mean: Tensor, m2: Tensor
) -> Launch:
    """Stage 2: merge partial [chunks, 2, C] and counts [1 + chunks] into count, mean and m2."""
    return Launch(
        merge_moments_kernel,
        (triton.cdiv(mean.numel(), MERGE_CHANNELS),),
        (partial, counts, count, mean, m2, partial.shape[0], mean.numel()),
        {"CHUNKS": MERGE_CHUNKS, "BLOCK": MERGE_CHANNELS, "num_warps": 4},
    )
