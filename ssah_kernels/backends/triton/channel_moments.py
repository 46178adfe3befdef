"""Triton ``channel_moments_``: running count, mean and M2 of every channel, in one pass.

    (N, mu, M2) <- Chan's merge of (N, mu, M2) with (n, mean, sum (x - mean)^2) of the unmasked rows

x [..., C], mask [...], count [] and mean, M2 [C] in float64.
Accumulation: float32 (float64 for float64 input) within a chunk, two passes over registers for
each tile of DEPTH rows per warp, with the mean kept as a pair; float64 between chunks.
Bytes per element: itemsize read (2 for bf16), plus 32 / chunk rows for the partial results, which
stay in the L2 cache. A masked row is not read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment"
# (Tuples grow as a loop is unrolled, and so change their type.)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import as_count, counted, place, wide, zeros_like_wide
from .launch import Launch, count_rows_, row_slices, run, tiling
from .moments import add_tile, merge_launch, store_moments

DEPTH = 8  # rows per warp and tile: 128 bytes in flight per thread


@triton.jit(do_not_specialize=["n_rows", "tiles", "first_chunk"])
def channel_moments_kernel(
    x_ptr, mask_ptr, count_ptr, partial_ptr, counts_ptr,
    n_rows, channels, x_stride, mask_stride, tiles, first_chunk,
    HAS_MASK: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, cols, first, own = place(n_rows, channels, tiles, DEPTH, WARPS, BLOCK)
    n = zeros_like_wide(x_ptr, (WARPS, 1))
    hi = zeros_like_wide(x_ptr, (WARPS, BLOCK))
    lo = zeros_like_wide(x_ptr, (WARPS, BLOCK))
    m2 = zeros_like_wide(x_ptr, (WARPS, BLOCK))
    x_ptr += first * x_stride + cols  # [WARPS, BLOCK]: each warp's next row
    if HAS_MASK:
        mask_ptr += first * mask_stride  # [WARPS, 1]
    for tile in range(0, tiles):
        xs, counts = (), ()  # of DEPTH rows of each warp: [WARPS, BLOCK] and [WARPS, 1]
        for i in tl.static_range(DEPTH):
            valid = counted(tile * DEPTH + i < own, mask_ptr, HAS_MASK)
            x = tl.load(x_ptr, mask=valid & (cols < channels), other=0)
            xs += (wide(x),)
            counts += (as_count(valid, n.dtype),)
            x_ptr += tl.cast(x_stride, tl.int64) * WARPS
            if HAS_MASK:
                mask_ptr += tl.cast(mask_stride, tl.int64) * WARPS
        n, hi, lo, m2 = add_tile(xs, counts, n, hi, lo, m2)
    total = store_moments(n, hi, lo, m2, first_chunk + chunk, cols, channels, partial_ptr, BLOCK)
    # One of a chunk's programs writes its count; the state's is kept before stage 2 changes it.
    if tl.program_id(0) % tl.cdiv(channels, BLOCK) == 0:
        tl.store(counts_ptr + 1 + first_chunk + chunk, total)
        tl.store(counts_ptr, tl.load(count_ptr))


def launches(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None
) -> list[Launch]:
    slices = row_slices([x], token_mask)  # views [rows, C], and [rows] of the mask
    rows, channels = slices[0][0].shape
    tile = tiling(rows, channels, x.element_size(), DEPTH)
    partial = mean.new_empty(len(slices) * tile.chunks, 2, channels)
    counts = mean.new_empty(1 + partial.shape[0])
    options = {"HAS_MASK": token_mask is not None, **tile.constants}
    stage1 = []
    for i, views in enumerate(slices):
        pointers = views if len(views) == 2 else (*views, None)
        strides = [0 if v is None else v.stride(0) for v in pointers]
        args = (*pointers, count, partial, counts, rows, channels, *strides)
        more = (tile.tiles, i * tile.chunks)
        stage1.append(Launch(channel_moments_kernel, tile.grid, (*args, *more), options))
    return [*stage1, merge_launch(partial, counts, count, mean, m2)]


def channel_moments_(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None = None
) -> None:
    if x.numel() == 0:
        count_rows_(x, token_mask, count)
    else:
        run(launches(x, count, mean, m2, token_mask), x.device)
