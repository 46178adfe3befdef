"""Triton ``taylor_moments_``: first-order importance of every channel, in one pass.

    signed <- signed + sum_i x_i g_i        squared <- squared + sum_i (x_i g_i)^2

x, grad [..., C], mask [...], signed and squared [C] in float64; the sums run over unmasked rows.
Accumulation: float32 (float64 for float64 input) within a chunk, float64 between chunks.
Bytes per element of x: 2 itemsize read (4 for bf16), plus 32 / chunk rows for the partial sums,
which stay in the L2 cache. A masked row is not read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment"
# (Tuples grow as a loop is unrolled, and so change their type.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import (
    add_launch,
    counted,
    place,
    store_row,
    wide,
    zeros_like_wide,
)
from .launch import Launch, row_slices, run, tiling

DEPTH = 4  # rows per warp and tile; with two inputs, 128 bytes in flight per thread
DEPTH_FLOAT64 = 2  # what the registers hold


@triton.jit(do_not_specialize=["n_rows", "tiles", "first_chunk", "chunks"])
def taylor_moments_kernel(
    x_ptr, grad_ptr, mask_ptr, partial_ptr,
    n_rows, channels, x_stride, grad_stride, mask_stride, tiles, first_chunk, chunks,
    HAS_MASK: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, cols, first, own = place(n_rows, channels, tiles, DEPTH, WARPS, BLOCK)
    signed = zeros_like_wide(x_ptr, (WARPS, BLOCK))
    squared = zeros_like_wide(x_ptr, (WARPS, BLOCK))
    x_ptr += first * x_stride + cols  # [WARPS, BLOCK]: each warp's next row
    grad_ptr += first * grad_stride + cols
    if HAS_MASK:
        mask_ptr += first * mask_stride  # [WARPS, 1]
    for tile in range(0, tiles):
        xs, grads = (), ()  # of DEPTH rows of each warp: [WARPS, BLOCK]
        for i in tl.static_range(DEPTH):
            valid = counted(tile * DEPTH + i < own, mask_ptr, HAS_MASK)
            xs += (tl.load(x_ptr, mask=valid & (cols < channels), other=0),)
            grads += (tl.load(grad_ptr, mask=valid & (cols < channels), other=0),)
            x_ptr += tl.cast(x_stride, tl.int64) * WARPS
            grad_ptr += tl.cast(grad_stride, tl.int64) * WARPS
            if HAS_MASK:
                mask_ptr += tl.cast(mask_stride, tl.int64) * WARPS
        # The last row first: what it waits for is all loads, which so are in flight together.
        product = wide(xs[DEPTH - 1]) * wide(grads[DEPTH - 1])
        of_tile, squares_of_tile = product, product * product
        for i in tl.static_range(2, DEPTH + 1):
            product = wide(xs[DEPTH - i]) * wide(grads[DEPTH - i])
            of_tile += product
            squares_of_tile += product * product
        signed += of_tile
        squared += squares_of_tile
    row = partial_ptr + (chunk + first_chunk) * channels
    store_row(row, cols, tl.sum(signed, 0), channels, BLOCK)
    store_row(row + tl.cast(chunks, tl.int64) * channels, cols, tl.sum(squared, 0), channels, BLOCK)


def launches(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None
) -> list[Launch]:
    slices = row_slices([x, grad], token_mask)
    rows, channels = slices[0][0].shape
    depth = DEPTH_FLOAT64 if x.dtype == torch.float64 else DEPTH
    tile = tiling(rows, channels, x.element_size(), depth)
    partial = signed.new_empty(2, len(slices) * tile.chunks, channels)  # [results, chunks, C]
    options = {"HAS_MASK": token_mask is not None, **tile.constants}
    stage1 = []
    for i, views in enumerate(slices):
        pointers = views if len(views) == 3 else (*views, None)  # no mask
        strides = [0 if v is None else v.stride(0) for v in pointers]
        args = (*pointers, partial, rows, channels, *strides)
        more = (tile.tiles, i * tile.chunks, partial.shape[1])
        stage1.append(Launch(taylor_moments_kernel, tile.grid, (*args, *more), options))
    return [*stage1, add_launch(partial, signed, squared)]


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> None:
    if x.numel():
        run(launches(x, grad, signed, squared, token_mask), x.device)
