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

from .launch import MERGE_CHANNELS, MERGE_CHUNKS, Launch


@triton.jit
def wide(x):
    """x in the type that it is computed in: float64 stays, all else becomes float32."""
    if x.dtype == tl.float64:
        return x
    elif x.dtype == tl.bfloat16:
        # One instruction: of the conversion every second of two neighbours takes two.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def zeros_like_wide(ptr, shape: tl.constexpr):
    if ptr.dtype.element_ty == tl.float64:
        return tl.zeros(shape, tl.float64)
    else:
        return tl.zeros(shape, tl.float32)


@triton.jit
def place(
    n_rows, channels, tiles,
    DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's chunk, its channels [1, BLOCK], and the first row of each of its warps and how
    many rows that warp has, [WARPS, 1]: of a chunk of 9 rows, warp 0 of 4 has rows 0, 4 and 8."""
    blocks = tl.cdiv(channels, BLOCK)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)  # rows times strides go beyond 2^31
    first = chunk * (tiles * (DEPTH * WARPS)) + tl.arange(0, WARPS)[:, None]
    own = tl.minimum(tl.cdiv(n_rows - first, WARPS), tiles * DEPTH)
    return chunk, cols[None, :], first, own.to(tl.int32)


@triton.jit
def counted(valid, mask_ptr, HAS_MASK: tl.constexpr):
    """Which of the ``valid`` rows [WARPS, 1] the mask does not leave out."""
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr, mask=valid, other=0) != 0)
    return valid


@triton.jit
def as_count(valid, DTYPE: tl.constexpr):
    """1 where ``valid`` and 0 elsewhere: one instruction, where a conversion takes two."""
    return tl.where(valid, tl.full((), 1, DTYPE), tl.full((), 0, DTYPE))


@triton.jit
def store_row(row_ptr, cols, values, channels, BLOCK: tl.constexpr):
    """Write one row of partial results [BLOCK] in float64; ``cols`` as ``place`` gives them."""
    cols = tl.reshape(cols, (BLOCK,))  # [1, BLOCK] -> [BLOCK]
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
