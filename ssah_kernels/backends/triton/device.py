"""Device side shared by the kernels: where a program works, masks, partial sums.

Stage 1 (in each operator's file): a program reads one chunk of rows, each element once, and
writes its (n, mean, M2) or its sums in float64. Stage 2: partial results are merged in the
order of the chunks, in float64. No atomics: the same input gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssah_kernels.backends.triton.launch import MERGE_CHANNELS, MERGE_CHUNKS, Launch


@triton.jit
def wide(x):
    """x in the type that it is computed in: float64 stays, all else becomes float32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def zeros_like_wide(ptr, shape: tl.constexpr):
    if ptr.dtype.element_ty == tl.float64:
        return tl.zeros(shape, tl.float64)
    else:
        return tl.zeros(shape, tl.float32)


@triton.jit
def place(channels, DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's chunk, its channels [1, 1, BLOCK], a tile's row offsets [DEPTH, WARPS, 1]."""
    blocks = tl.cdiv(channels, BLOCK)
    chunk = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, DEPTH)[:, None, None] * WARPS + tl.arange(0, WARPS)[None, :, None]
    # Rows times strides go beyond 2^31 in large activations.
    return chunk.to(tl.int64), cols[None, None, :], rows


@triton.jit
def counted(rows, n_rows, mask_ptr, mask_stride, HAS_MASK: tl.constexpr):
    """Which rows exist and are not masked: bool, shaped as ``rows``."""
    valid = rows < n_rows
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + rows * mask_stride, mask=valid, other=0) != 0)
    return valid


@triton.jit
def store_row(row_ptr, cols, values, channels, BLOCK: tl.constexpr):
    """Write one row of partial results [BLOCK] in float64; ``cols`` as ``place`` gives them."""
    cols = tl.reshape(cols, (BLOCK,))  # [1, 1, BLOCK] -> [BLOCK]
    tl.store(row_ptr + cols, values.to(tl.float64), mask=cols < channels)


@triton.jit
def add_chunks_kernel(
    partial_ptr, first_ptr, second_ptr, chunks, channels,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stage 2 of a sum: add partial [1 or 2, chunks, channels] to first (and to second)."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < channels
    state_ptr = first_ptr
    if tl.program_id(1) == 1:
        state_ptr = second_ptr
        partial_ptr += tl.cast(chunks, tl.int64) * channels
    total = tl.load(state_ptr + cols, mask=inside, other=0)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        here = (chunk < chunks)[:, None] & inside[None, :]  # [CHUNKS, BLOCK]
        row = partial_ptr + chunk[:, None].to(tl.int64) * channels + cols[None, :]
        total += tl.sum(tl.load(row, mask=here, other=0), 0)
    tl.store(state_ptr + cols, total, mask=inside)


def add_launch(partial: Tensor, *states: Tensor) -> Launch:
    """Stage 2 of a sum: add partial [len(states), chunks, C] to the states [C]."""
    _, chunks, channels = partial.shape
    return Launch(
        add_chunks_kernel,
        (triton.cdiv(channels, MERGE_CHANNELS), len(states)),
        (partial, states[0], states[-1], chunks, channels),
        {"CHUNKS": MERGE_CHUNKS, "BLOCK": MERGE_CHANNELS, "num_warps": 4},
    )
