"""Device side shared by the kernels: where a program works, masks, partial sums.

Stage 1 (in each operator's file): a program reads one chunk of rows, each element once, and
writes its (n, mean, M2) or its sums in float64. Stage 2: partial results are merged in the
order of the chunks, in float64. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    """This program's chunk, its channels [1, 1, BLOCK], and a tile's row offsets [DEPTH, WARPS, 1]."""
    blocks = tl.cdiv(channels, BLOCK)
    chunk = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, DEPTH)[:, None, None] * WARPS + tl.arange(0, WARPS)[None, :, None]
    return chunk.to(tl.int64), cols[None, None, :], rows


@triton.jit
def counted(rows, n_rows, mask_ptr, mask_stride, HAS_MASK: tl.constexpr):
    """Which rows exist and are not masked: bool, shaped as ``rows``."""
    valid = rows < n_rows
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + rows * mask_stride, mask=valid, other=0) != 0)
    return valid


@triton.jit
def sum_chunks(ptr, cols, stride, chunks, inside, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over chunks of ptr[chunk * stride + cols], in fixed order: float64 [BLOCK]."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        here = (chunk < chunks)[:, None] & inside[None, :]
        part = tl.load(
            ptr + chunk[:, None].to(tl.int64) * stride + cols[None, :], mask=here, other=0
        )
        total += tl.sum(part, 0)
    return total


@triton.jit
def store_row(row_ptr, cols, values, channels, BLOCK: tl.constexpr):
    """Write one row of partial results [BLOCK] in float64; ``cols`` as ``place`` gives them."""
    cols = tl.reshape(cols, (BLOCK,))
    tl.store(row_ptr + cols, values.to(tl.float64), mask=cols < channels)
