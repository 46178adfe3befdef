"""Triton ``taylor_moments_``: first-order importance of every channel, in one pass.

    signed <- signed + sum_i x_i g_i        squared <- squared + sum_i (x_i g_i)^2

x, grad [..., C], mask [...], signed and squared [C] in float64; the sums run over unmasked rows.
Accumulation: float32 (float64 for float64 input) within a chunk, float64 between chunks.
Bytes per element of x: 2 itemsize read (4 for bf16), plus 32 / chunk rows for the partial sums,
which stay in the L2 cache. A masked row is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssah_kernels.backends.triton.device import (
    counted,
    place,
    store_row,
    sum_chunks,
    wide,
    zeros_like_wide,
)
from ssah_kernels.backends.triton.launch import (
    MERGE_CHANNELS,
    MERGE_CHUNKS,
    Launch,
    row_slices,
    run,
    tiling,
)

DEPTH = 4  # rows per warp and tile; with two inputs, 128 bytes in flight per thread


@triton.jit(do_not_specialize=["n_rows", "tiles", "first_chunk"])
def taylor_moments_kernel(
    x_ptr, grad_ptr, mask_ptr, partial_ptr,
    n_rows, channels, x_stride, grad_stride, mask_stride, tiles, first_chunk,
    HAS_MASK: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, cols, offsets = place(channels, DEPTH, WARPS, BLOCK)
    signed = zeros_like_wide(x_ptr, (WARPS, BLOCK))
    squared = zeros_like_wide(x_ptr, (WARPS, BLOCK))
    for tile in range(0, tiles):
        rows = (chunk * tiles + tile) * (DEPTH * WARPS) + offsets
        inside = counted(rows, n_rows, mask_ptr, mask_stride, HAS_MASK) & (cols < channels)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=inside, other=0)
        grad = tl.load(grad_ptr + rows * grad_stride + cols, mask=inside, other=0)
        product = wide(x) * wide(grad)
        signed += tl.sum(product, 0)
        squared += tl.sum(product * product, 0)
    row = partial_ptr + (first_chunk + chunk) * 2 * channels
    store_row(row, cols, tl.sum(signed, 0), channels, BLOCK)
    store_row(row + channels, cols, tl.sum(squared, 0), channels, BLOCK)


@triton.jit
def add_sums_kernel(
    partial_ptr, signed_ptr, squared_ptr, chunks, channels,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stage 2: add partial [chunks, 2, channels] to signed and squared."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < channels
    signed = sum_chunks(partial_ptr, cols, 2 * channels, chunks, inside, CHUNKS, BLOCK)
    squared = sum_chunks(partial_ptr + channels, cols, 2 * channels, chunks, inside, CHUNKS, BLOCK)
    signed += tl.load(signed_ptr + cols, mask=inside, other=0)
    squared += tl.load(squared_ptr + cols, mask=inside, other=0)
    tl.store(signed_ptr + cols, signed, mask=inside)
    tl.store(squared_ptr + cols, squared, mask=inside)


def launches(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None
) -> list[Launch]:
    slices = row_slices([x, grad], token_mask)
    rows, channels = slices[0][0].shape
    tile = tiling(rows, channels, x.element_size(), DEPTH)
    partial = signed.new_empty(len(slices) * tile.chunks, 2, channels)
    options = {"HAS_MASK": token_mask is not None, **tile.constants}
    stage1 = []
    for i, views in enumerate(slices):
        pointers = views if len(views) == 3 else (*views, None)
        strides = [0 if v is None else v.stride(0) for v in pointers]
        args = (*pointers, partial, rows, channels, *strides, tile.tiles, i * tile.chunks)
        stage1.append(Launch(taylor_moments_kernel, tile.grid, args, options))
    stage2 = Launch(
        add_sums_kernel,
        (triton.cdiv(channels, MERGE_CHANNELS),),
        (partial, signed, squared, partial.shape[0], channels),
        {"CHUNKS": MERGE_CHUNKS, "BLOCK": MERGE_CHANNELS, "num_warps": 4},
    )
    return [*stage1, stage2]


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> None:
    if x.numel():
        run(launches(x, grad, signed, squared, token_mask), x.device)
