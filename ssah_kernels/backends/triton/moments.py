"""Device side of the moments: of a tile, of a chunk, and Chan's merge."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import store_row
from .launch import MERGE_CHANNELS, MERGE_CHUNKS, Launch


@triton.jit
def add_tile(rows, counts, n, hi, lo, m2):
    """Merge a tile's ``rows``, a tuple of [WARPS, BLOCK], into each warp's running moments.

    ``counts``, a tuple of [WARPS, 1], is 1 where a row counts and 0 elsewhere, where the row is 0.
    n is [WARPS, 1], the rest [WARPS, BLOCK]. Two passes over registers, then Chan's merge, so that
    an outlier costs no digits. The mean is hi + lo: hi is the mean of the first tile that has a
    row, and lo, of the size of the deviations, loses nothing to a large mean.
    """
    n_tile, total = counts[0], rows[0]
    for i in tl.static_range(1, len(rows)):
        n_tile += counts[i]
        total += rows[i]
    inverse = 1 / tl.maximum(n_tile, 1)  # of a warp: nothing here is computed per channel
    n_new = n + n_tile
    weight = n_tile / tl.maximum(n_new, 1)  # 0 for a tile without rows, whose moments are 0
    centre = total * inverse
    d = rows[0] - counts[0] * centre  # 0 where the row does not count, at the cost of a difference
    sum_d, squares = d, d * d
    for i in tl.static_range(1, len(rows)):
        d = rows[i] - counts[i] * centre
        sum_d += d
        squares += d * d
    rest = sum_d * inverse  # what rounding left of the tile's mean
    hi = tl.where(n > 0, hi, centre)
    delta = (centre - hi) + (rest - lo)
    m2 += squares - sum_d * rest + delta * delta * (n * weight)
    return n_new, hi, lo + delta * weight, m2


@triton.jit
def store_moments(n, hi, lo, m2, chunk, cols, channels, partial_ptr, BLOCK: tl.constexpr):
    """Merge the warps' moments into partial [chunks, 2, channels] (mean, M2); returns the count.

    Means are handled as distances from one origin: float32 then loses nothing to a large mean, and
    half the registers of float64 are needed.
    """
    # Summed as a pair, so that n is kept in the layout of hi alone.
    pair = tl.join(tl.broadcast_to(n, hi.shape), n * hi)  # [WARPS, BLOCK, 2]
    total, origin = tl.split(tl.sum(pair, 0))  # [BLOCK] each
    inverse = 1 / tl.maximum(total, 1)
    origin *= inverse
    distance = tl.where(n > 0, (hi - origin[None, :]) + lo, 0)  # [WARPS, BLOCK]
    mean = tl.sum(n * distance, 0) * inverse
    deviation = tl.where(n > 0, distance - mean[None, :], 0)
    m2 = tl.sum(m2 + n * (deviation * deviation), 0)
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
