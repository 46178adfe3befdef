"""Triton ``column_sq_norms``: squared Euclidean norm of every column, in one pass.

    norms_j = sum_i weight_ij^2

weight [out_features, in_features] -> norms [in_features] in float64.
Accumulation: float32 (float64 for float64 input) within a chunk of rows, float64 between chunks.
Bytes per element: itemsize read (2 for bf16), plus 16 / chunk rows in the L2 cache.
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
    place,
    store_row,
    wide,
    zeros_like_wide,
)
from .launch import Launch, run, tiling

DEPTH = 8  # rows per warp and tile: 128 bytes in flight per thread


@triton.jit(do_not_specialize=["n_rows", "tiles"])
def column_sq_norms_kernel(
    weight_ptr, partial_ptr, n_rows, channels, stride, tiles,
    DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, cols, first, own = place(n_rows, channels, tiles, DEPTH, WARPS, BLOCK)
    squares = zeros_like_wide(weight_ptr, (WARPS, BLOCK))
    weight_ptr += first * stride + cols  # [WARPS, BLOCK]: each warp's next row
    for tile in range(0, tiles):
        rows = ()  # DEPTH rows of each warp: [WARPS, BLOCK]
        for i in tl.static_range(DEPTH):
            inside = (tile * DEPTH + i < own) & (cols < channels)
            rows += (tl.load(weight_ptr, mask=inside, other=0),)
            weight_ptr += tl.cast(stride, tl.int64) * WARPS
        # The last row first: what it waits for is all loads, which so are in flight together.
        w = wide(rows[DEPTH - 1])
        of_tile = w * w
        for i in tl.static_range(2, DEPTH + 1):
            w = wide(rows[DEPTH - i])
            of_tile += w * w
        squares += of_tile
    store_row(partial_ptr + chunk * channels, cols, tl.sum(squares, 0), channels, BLOCK)


def launches(weight: Tensor, norms: Tensor) -> list[Launch]:
    rows, channels = weight.shape
    tile = tiling(rows, channels, weight.element_size(), DEPTH)
    partial = norms.new_empty(1, tile.chunks, channels)  # [results, chunks, channels]
    return [
        Launch(
            column_sq_norms_kernel,
            tile.grid,
            (weight, partial, rows, channels, weight.stride(0), tile.tiles),
            tile.constants,
        ),
        add_launch(partial, norms),
    ]


def column_sq_norms(weight: Tensor) -> Tensor:
    norms = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    if weight.numel():
        run(launches(weight, norms), weight.device)
    return norms
