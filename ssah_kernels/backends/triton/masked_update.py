"""Device side of ``masked_adamw_`` and ``masked_sgd_``: one pass over a list's trained elements.

    read p, g, states (and the remainder c); update; write p, states (and c)

The list is a table of pointers, shapes and strides in device memory, so that one launch serves
every tensor that can be accessed alike. A compact matrix [rows, cols] is cut into tiles of
STEPS * HEIGHT rows and BLOCK columns; a program takes one tile, HEIGHT rows at a time.
Computation: float32 (float64 for float64 parameters); each written value is rounded once.
Triton inlines every function below: that the kernel is cut into several costs no call.
Bytes per trained element: AdamW in float32 28, in bfloat16 with bfloat16 state 14, with float32
state 22, with state in 8 bits 10.1; SGD with momentum in float32 20; a compensation 2 itemsize
more, and a float32 gradient of 16 bits 2. Importance adds 32 / BLOCK (rows) or 32 / 128 (columns)
bytes of partial sums, which stay in the L2 cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .device import wide
from .masked_codes import nearest_codes, read_codes
from .masked_rounding import (
    compensated,
    noise,
    noise_keys,
    rounded,
    split,
)
from .masked_rules import adamw, rule_scalars, sgd
from .masked_table import (
    COL_STRIDE,
    COLS,
    FIELDS,
    FIRST,
    GRAD,
    GRAD_COL_STRIDE,
    GRAD_ROW_STRIDE,
    HEAD,
    INDEX,
    INDEXED_ROWS,
    NUMBER,
    PARAM,
    PARTIAL,
    PARTS,
    REMAINDER,
    ROW_STRIDE,
    ROWS,
    SCALES_0,
    SCALES_1,
    STATE_0,
    STATE_1,
    find_row,
    pointer,
    scalar_or_one,
)


@triton.jit
def grad_factor(clip_coef_ptr, grad_scale_ptr, MAXIMIZE: tl.constexpr):
    """By what the gradient is multiplied before the step, in float64."""
    scale = scalar_or_one(clip_coef_ptr) / scalar_or_one(grad_scale_ptr)
    return -scale if MAXIMIZE else scale


@triton.jit
def n_steps(n_rows, first_row, found_inf_ptr, STEPS: tl.constexpr, HEIGHT: tl.constexpr):
    """How often HEIGHT rows are left of a tile: never, where a gradient overflowed."""
    steps = tl.minimum(tl.cdiv(n_rows - first_row, HEIGHT), STEPS)
    if found_inf_ptr is not None:
        steps = tl.where(tl.load(found_inf_ptr) == 0, steps, 0)
    return steps.to(tl.int32)


@triton.jit
def param_cols(index_ptr, cols, inside, GATHER: tl.constexpr):
    """Which columns of the parameter compact columns are."""
    if GATHER:
        return tl.load(index_ptr + cols, mask=inside, other=0)
    else:
        return cols


@triton.jit
def place(row_ptr, cols, ROW_STRIDE: tl.constexpr, COL_STRIDE: tl.constexpr, VECTOR: tl.constexpr):
    """The stride of rows, and where ``cols`` lie in each of them; the strides are fields."""
    row_stride = tl.load(row_ptr + ROW_STRIDE) * VECTOR
    # With vectors the stride is 1, and no multiplication may hide that from the compiler.
    if VECTOR == 1:
        cols *= tl.load(row_ptr + COL_STRIDE)
    return row_stride, cols


@triton.jit
def param_rows(indexed_rows, index_ptr, rows, GATHER: tl.constexpr):
    """Which rows of the parameter compact rows are."""
    if GATHER:
        return rows
    else:
        indexed = rows < indexed_rows  # all of them or none
        return tl.where(indexed, tl.load(index_ptr + rows, mask=indexed, other=0), rows)


@triton.jit
def store_sums(part_ptr, all_parts, signed, squared, mask, DIM: tl.constexpr):
    """A tile's part of the importance of its units: sums along dimension ``DIM``."""
    total = tl.sum(signed, DIM, keep_dims=True).to(tl.float64)
    tl.store(part_ptr, total, mask=mask)
    total = tl.sum(squared, DIM, keep_dims=True).to(tl.float64)
    tl.store(part_ptr + all_parts, total, mask=mask)


@triton.jit
def load_state(
    s_ptr, scales_ptr, map_ptr, element, block, inside, rows_inside,
    WHICH: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """State number ``WHICH`` at ``element``; in 8 bits, its codes times the scale of ``block``."""
    state = tl.load(s_ptr + element, mask=inside, other=0)
    if map_ptr is not None:
        scales = tl.load(scales_ptr + block, mask=rows_inside, other=0)
        state = read_codes(state, scales, map_ptr, WHICH)
    return wide(state).to(X)


@triton.jit
def store_state(
    s_ptr, scales_ptr, map_ptr, element, block, inside, rows_inside, state, bits,
    WHICH: tl.constexpr, NOISE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Write what :func:`load_state` reads."""
    if map_ptr is not None:
        new, scales = nearest_codes(state, inside, map_ptr, WHICH)
        tl.store(scales_ptr + block, scales, mask=rows_inside)
    else:
        new = rounded(state, bits, WHICH + 1, NOISE, S)
    tl.store(s_ptr + element, new, mask=inside)


@triton.jit
def take_step(
    stored, grad, p_ptr, s0_ptr, s1_ptr, scales_0_ptr, scales_1_ptr, c_ptr, map_ptr,
    element, block, inside, rows_inside, scalars, bits,
    RULE: tl.constexpr, STATES: tl.constexpr, NESTEROV: tl.constexpr, COMPENSATED: tl.constexpr,
    NOISE: tl.constexpr, P: tl.constexpr, S: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Update the parameters ``stored`` at ``p_ptr``, and states and remainders at ``element``."""
    # The compensated weight moves; importance is of the weight that the forward pass used.
    w = wide(stored).to(X)
    state_0 = w  # defined for every rule; without state it is never stored
    state_1 = w
    if COMPENSATED:
        w = compensated(stored, tl.load(c_ptr + element, mask=inside, other=0))
    if STATES > 0:
        state_0 = load_state(
            s0_ptr, scales_0_ptr, map_ptr, element, block, inside, rows_inside, 0, X
        )
    if STATES > 1:
        state_1 = load_state(
            s1_ptr, scales_1_ptr, map_ptr, element, block, inside, rows_inside, 1, X
        )
    if RULE == "adamw":
        w, state_0, state_1 = adamw(w, grad, state_0, state_1, scalars)
    else:
        w, state_0 = sgd(w, grad, state_0, scalars, STATES, NESTEROV)
    if COMPENSATED:
        new, rest = split(w, P)
        tl.store(c_ptr + element, rest, mask=inside)
        tl.store(p_ptr, new, mask=inside)
    else:
        tl.store(p_ptr, rounded(w, bits, 0, NOISE, P), mask=inside)
    if STATES > 0:
        store_state(
            s0_ptr, scales_0_ptr, map_ptr, element, block, inside, rows_inside, state_0, bits,
            0, NOISE, S,
        )  # fmt: skip
    if STATES > 1:
        store_state(
            s1_ptr, scales_1_ptr, map_ptr, element, block, inside, rows_inside, state_1, bits,
            1, NOISE, S,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tensors"])
def masked_update_kernel(
    table_ptr, partial_ptr, lr_ptr, step_ptr, grad_scale_ptr, clip_coef_ptr, seed_ptr,
    found_inf_ptr, map_ptr, n_tensors,
    RULE: tl.constexpr, STATES: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    COMPENSATED: tl.constexpr, UNITS: tl.constexpr, GATHER: tl.constexpr, FAR: tl.constexpr,
    THROUGH_INDEX: tl.constexpr, P: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """VECTOR: elements by which every shape, stride and pointer is aligned. GATHER: dims is 1 and
    there is an index. THROUGH_INDEX: the gradient is not compact, but lies as its parameter does.
    UNITS: the dimension along which importance is summed per entry, or -1.
    map_ptr: the maps of state in 8 bits, whose blocks are the rows of a tile; else None."""
    X: tl.constexpr = tl.float64 if tl.float64 == P else tl.float32
    NOISE: tl.constexpr = seed_ptr is not None
    row_ptr = find_row(table_ptr, n_tensors, HEAD, FIELDS)
    p_ptr, g_ptr = pointer(row_ptr, PARAM, P, VECTOR), pointer(row_ptr, GRAD, G, VECTOR)
    s0_ptr, s1_ptr = pointer(row_ptr, STATE_0, S, VECTOR), pointer(row_ptr, STATE_1, S, VECTOR)
    # What a parameter of 16 bits cannot hold: of bfloat16 the other half of a float32 weight.
    c_ptr = pointer(row_ptr, REMAINDER, tl.int16 if tl.bfloat16 == P else P, VECTOR)
    scales_0_ptr = pointer(row_ptr, SCALES_0, tl.float32, 1)
    scales_1_ptr = pointer(row_ptr, SCALES_1, tl.float32, 1)
    index_ptr, indexed_rows = pointer(row_ptr, INDEX, tl.int64, 1), tl.load(row_ptr + INDEXED_ROWS)
    # Columns are held divided by VECTOR: the compiler sees the factor.
    n_rows, n_cols = tl.load(row_ptr + ROWS), tl.load(row_ptr + COLS) * VECTOR
    tile = tl.program_id(0) - tl.load(row_ptr + FIRST)  # within this tensor
    blocks = tl.cdiv(n_cols, BLOCK)
    tile_row, tile_col = tile // blocks, tile % blocks
    cols = tile_col * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside_cols = cols < n_cols
    selected = param_cols(index_ptr, cols, inside_cols, GATHER)
    row_stride, p_cols = place(row_ptr, selected, ROW_STRIDE, COL_STRIDE, VECTOR)
    g_row_stride, g_cols = place(row_ptr, selected, GRAD_ROW_STRIDE, GRAD_COL_STRIDE, VECTOR)

    step = tl.load(step_ptr)
    scale = grad_factor(clip_coef_ptr, grad_scale_ptr, MAXIMIZE)
    # No load moves past a store: what stays the same is read, and computed, before the first row.
    scalars = rule_scalars(table_ptr, tl.load(lr_ptr), step, scale, RULE, X)
    key_0, key_1 = noise_keys(seed_ptr, step, row_ptr + NUMBER)
    if UNITS >= 0:
        partial_ptr += tl.load(row_ptr + PARTIAL)
        all_parts = tl.load(row_ptr + PARTS) * (n_rows if UNITS == 0 else n_cols)
    signed, squared = tl.zeros((HEIGHT, BLOCK), X), tl.zeros((HEIGHT, BLOCK), X)

    for i in range(0, n_steps(n_rows, tile_row * (STEPS * HEIGHT), found_inf_ptr, STEPS, HEIGHT)):
        rows = (tile_row * STEPS + i) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
        inside = (rows < n_rows) & inside_cols
        element = rows * n_cols + cols
        p_rows = param_rows(indexed_rows, index_ptr, rows, GATHER)
        at = p_ptr + p_rows * row_stride + p_cols
        stored = tl.load(at, mask=inside, other=0)
        g_at = p_rows * g_row_stride + g_cols if THROUGH_INDEX else element
        grad = wide(tl.load(g_ptr + g_at, mask=inside, other=0)).to(X)
        if UNITS >= 0:
            # Before the update, and by the gradient before clipping; stage 2 takes the scale out.
            product = wide(stored).to(X) * grad
            if UNITS == 0:
                part_ptr = partial_ptr + tile_col * n_rows + rows  # rows are units
                store_sums(part_ptr, all_parts, product, product * product, rows < n_rows, 1)
            else:
                signed += product
                squared += product * product
        bits = noise(rows * n_cols, cols, key_0, key_1, FAR) if NOISE else element
        take_step(
            stored, grad, at, s0_ptr, s1_ptr, scales_0_ptr, scales_1_ptr, c_ptr, map_ptr,
            element, rows * blocks + tile_col, inside, rows < n_rows, scalars, bits,
            RULE, STATES, NESTEROV, COMPENSATED, NOISE, P, S, X,
        )  # fmt: skip

    if UNITS == 1:
        part_ptr = partial_ptr + tile_row * n_cols + cols  # columns are units
        store_sums(part_ptr, all_parts, signed, squared, inside_cols, 0)
