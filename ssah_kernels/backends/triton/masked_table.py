"""Device side of a list of tensors: a table in device memory, searched by every program.

A table is int64: a head of hyperparameters, then one row per tensor, whose first field is the first
program that works on the tensor.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

HEAD = tl.constexpr(8)  # hyperparameters before the rows of the table, as the bits of float64
FIELDS = tl.constexpr(19)
FIRST, PARAM, GRAD, STATE_0, STATE_1, SCALES_0, SCALES_1 = (tl.constexpr(i) for i in range(7))
REMAINDER, INDEX, INDEXED_ROWS, ROWS, COLS = (tl.constexpr(i) for i in range(7, 12))
ROW_STRIDE, COL_STRIDE, GRAD_ROW_STRIDE, GRAD_COL_STRIDE = (tl.constexpr(i) for i in range(12, 16))
NUMBER, PARTIAL, PARTS = (tl.constexpr(i) for i in range(16, 19))


@triton.jit
def hyper(table_ptr, INDEX: tl.constexpr):
    """A hyperparameter from the head of the table, in float64."""
    return tl.load(table_ptr + INDEX).to(tl.float64, bitcast=True)


@triton.jit
def scalar_or_one(ptr):
    if ptr is None:
        return tl.full((), 1.0, tl.float64)
    else:
        return tl.load(ptr)


@triton.jit
def find_row(table_ptr, n_rows, HEAD: tl.constexpr, FIELDS: tl.constexpr):
    """The row of a table that this program works on: the last that begins at it or before it."""
    low = 0
    high = n_rows
    while high - low > 1:
        middle = (low + high) // 2
        here = tl.load(table_ptr + HEAD + middle * FIELDS) <= tl.program_id(0)
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return table_ptr + HEAD + low * FIELDS


@triton.jit
def pointer(row_ptr, FIELD: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    ptr = tl.load(row_ptr + FIELD).to(tl.pointer_type(DTYPE))
    if VECTOR > 1:
        ptr = tl.multiple_of(ptr, 16)  # the compiler cannot see it in an address from memory
    return ptr


@triton.jit(do_not_specialize=["n_tensors"])
def add_importance_kernel(
    table_ptr, partial_ptr, grad_scale_ptr, found_inf_ptr, n_tensors,
    FIELDS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stage 2: add partial [2, parts, units], divided by the gradient scale, to signed and squared.
    Where an infinite gradient was found, there are no parts, and nothing is added.

    A row of the table: first program, signed, squared, offset of the partial sums, parts, units.
    """
    row_ptr = find_row(table_ptr, n_tensors, 0, FIELDS)
    parts = tl.load(row_ptr + 4)
    units = tl.load(row_ptr + 5)
    if found_inf_ptr is not None:
        units = tl.where(tl.load(found_inf_ptr) == 0, units, 0)
    cols = (tl.program_id(0) - tl.load(row_ptr)) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < units
    unscale = 1 / scalar_or_one(grad_scale_ptr)
    if tl.program_id(1) == 1:  # the sum of squares
        unscale *= unscale
    state_ptr = tl.load(row_ptr + 1 + tl.program_id(1)).to(tl.pointer_type(tl.float64))
    partial_ptr += tl.load(row_ptr + 3) + tl.program_id(1) * parts * units
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, CHUNKS):
        part = start + tl.arange(0, CHUNKS)[:, None]
        here = (part < parts) & inside[None, :]
        total += tl.sum(tl.load(partial_ptr + part * units + cols[None, :], mask=here, other=0), 0)
    total = tl.load(state_ptr + cols, mask=inside, other=0) + unscale * total
    tl.store(state_ptr + cols, total, mask=inside)
