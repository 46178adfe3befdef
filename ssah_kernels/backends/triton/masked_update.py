"""Device side of ``masked_adamw_`` and ``masked_sgd_``: one pass over a list's trained elements.

    read p, g, states (and the remainder c); update; write p, states (and c)

The list is a table of pointers, shapes and strides in device memory, so that one launch serves
every tensor that can be accessed alike. A compact matrix [rows, cols] is cut into tiles of
STEPS * HEIGHT rows and BLOCK columns; a program takes one tile, HEIGHT rows at a time.
Computation: float32 (float64 for float64 parameters); each written value is rounded once.
Bytes per trained element: AdamW in float32 28, in bfloat16 with bfloat16 state 14, with float32
state 22, with state in 8 bits 10.1; SGD with momentum in float32 20; a compensation 2 itemsize
more. Importance adds 32 / BLOCK (rows) or 32 / 128 (columns) bytes of partial sums, which stay in
the L2 cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from ssah_kernels.backends.triton.masked_codes import nearest_codes, read_codes
from ssah_kernels.backends.triton.masked_rounding import (
    KEY_0,
    KEY_1,
    compensated,
    noise,
    noise_key,
    rounded,
    split,
)
from ssah_kernels.backends.triton.masked_rules import adamw, sgd
from ssah_kernels.backends.triton.masked_table import (
    COL_STRIDE,
    COLS,
    FIELDS,
    FIRST,
    GRAD,
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


@triton.jit(do_not_specialize=["n_tensors"])
def masked_update_kernel(
    table_ptr, partial_ptr, lr_ptr, step_ptr, grad_scale_ptr, clip_coef_ptr, seed_ptr, map_ptr,
    n_tensors,
    RULE: tl.constexpr, STATES: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    COMPENSATED: tl.constexpr, UNITS: tl.constexpr, GATHER: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, VECTOR: tl.constexpr,
    STEPS: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """VECTOR: elements by which every shape, stride and pointer is aligned. GATHER: dims is 1 and
    there is an index. UNITS: the dimension along which importance is summed per entry, or -1.
    map_ptr: the maps of state in 8 bits, whose blocks are the rows of a tile; else None."""
    X: tl.constexpr = tl.float64 if tl.float64 == P else tl.float32
    NOISE: tl.constexpr = seed_ptr is not None
    CODES: tl.constexpr = map_ptr is not None
    row_ptr = find_row(table_ptr, n_tensors, HEAD, FIELDS)
    p_ptr = pointer(row_ptr, PARAM, P, VECTOR)
    g_ptr = pointer(row_ptr, GRAD, P, VECTOR)
    s0_ptr = pointer(row_ptr, STATE_0, S, VECTOR)
    s1_ptr = pointer(row_ptr, STATE_1, S, VECTOR)
    # What a parameter of 16 bits cannot hold: of bfloat16 the other half of a float32 weight.
    c_ptr = pointer(row_ptr, REMAINDER, tl.int16 if tl.bfloat16 == P else P, VECTOR)
    scales_0_ptr = pointer(row_ptr, SCALES_0, tl.float32, 1)
    scales_1_ptr = pointer(row_ptr, SCALES_1, tl.float32, 1)
    index_ptr = pointer(row_ptr, INDEX, tl.int64, 1)
    n_rows = tl.load(row_ptr + ROWS)
    n_cols = tl.load(row_ptr + COLS) * VECTOR  # held divided by it: the compiler sees the factor
    row_stride = tl.load(row_ptr + ROW_STRIDE) * VECTOR
    tile = tl.program_id(0) - tl.load(row_ptr + FIRST)  # within this tensor
    blocks = tl.cdiv(n_cols, BLOCK)
    tile_row = tile // blocks
    cols = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside_cols = cols < n_cols
    if GATHER:
        p_cols = tl.load(index_ptr + cols, mask=inside_cols, other=0)
    else:
        p_cols = cols
    # With vectors the stride is 1, and no multiplication may hide that from the compiler.
    if VECTOR == 1:
        p_cols *= tl.load(row_ptr + COL_STRIDE)

    lr = tl.load(lr_ptr)
    step = tl.load(step_ptr)
    scale = scalar_or_one(clip_coef_ptr) / scalar_or_one(grad_scale_ptr)
    scale = (-scale if MAXIMIZE else scale).to(X)
    if NOISE:  # one stream of noise for each tensor and step
        seed = tl.load(seed_ptr)
        number = tl.load(row_ptr + NUMBER)
        key_0 = noise_key(KEY_0, seed, step.to(tl.int64), number)
        key_1 = noise_key(KEY_1, seed, step.to(tl.int64), number)
    if UNITS >= 0:
        partial_ptr += tl.load(row_ptr + PARTIAL)
        all_parts = tl.load(row_ptr + PARTS) * (n_rows if UNITS == 0 else n_cols)
    signed = tl.zeros((HEIGHT, BLOCK), X)
    squared = tl.zeros((HEIGHT, BLOCK), X)

    steps = tl.minimum(tl.cdiv(n_rows - tile_row * (STEPS * HEIGHT), HEIGHT), STEPS)
    for i in range(0, steps):
        rows = (tile_row * STEPS + i) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
        inside = (rows < n_rows) & inside_cols
        p_rows = rows
        if not GATHER:
            indexed = rows < tl.load(row_ptr + INDEXED_ROWS)  # all of them or none
            p_rows = tl.where(indexed, tl.load(index_ptr + rows, mask=indexed, other=0), rows)
        element = rows * n_cols + cols
        at = p_ptr + p_rows * row_stride + p_cols
        stored = tl.load(at, mask=inside, other=0)
        p = stored.to(X)
        grad = tl.load(g_ptr + element, mask=inside, other=0).to(X)
        if UNITS >= 0:
            # Before the update, and by the gradient before clipping; stage 2 takes the scale out.
            product = p * grad
            square = product * product
            if UNITS == 0:
                part = partial_ptr + (tile % blocks) * n_rows + rows  # rows are units
                here = rows < n_rows
                total = tl.sum(product, 1, keep_dims=True).to(tl.float64)
                tl.store(part, total, mask=here)
                total = tl.sum(square, 1, keep_dims=True).to(tl.float64)
                tl.store(part + all_parts, total, mask=here)
            else:
                signed += product
                squared += square
        # The compensated weight moves; importance is of the weight that the forward pass used.
        w = p
        if COMPENSATED:
            w = compensated(stored, tl.load(c_ptr + element, mask=inside, other=0))
        state_0 = p  # defined for every rule; without state it is never stored
        state_1 = p
        state_block = rows * blocks + tile % blocks
        if STATES > 0:
            state_0 = tl.load(s0_ptr + element, mask=inside, other=0)
            if CODES:
                scales = tl.load(scales_0_ptr + state_block, mask=rows < n_rows, other=0)
                state_0 = read_codes(state_0, scales, map_ptr, 0)
            state_0 = state_0.to(X)
        if STATES > 1:
            state_1 = tl.load(s1_ptr + element, mask=inside, other=0)
            if CODES:
                scales = tl.load(scales_1_ptr + state_block, mask=rows < n_rows, other=0)
                state_1 = read_codes(state_1, scales, map_ptr, 1)
            state_1 = state_1.to(X)
        if RULE == "adamw":
            w, state_0, state_1 = adamw(w, grad * scale, state_0, state_1, table_ptr, lr, step, X)
        else:
            w, state_0 = sgd(w, grad * scale, state_0, table_ptr, lr, step, STATES, NESTEROV, X)
        bits = element
        if NOISE:
            bits = noise(element, key_0, key_1)
        if COMPENSATED:
            new, rest = split(w, P)
            tl.store(c_ptr + element, rest, mask=inside)
            tl.store(at, new, mask=inside)
        else:
            tl.store(at, rounded(w, bits, 0, NOISE, P), mask=inside)
        if STATES > 0:
            if CODES:
                new_0, scales = nearest_codes(state_0, inside, map_ptr, 0)
                tl.store(scales_0_ptr + state_block, scales, mask=rows < n_rows)
            else:
                new_0 = rounded(state_0, bits, 1, NOISE, S)
            tl.store(s0_ptr + element, new_0, mask=inside)
        if STATES > 1:
            if CODES:
                new_1, scales = nearest_codes(state_1, inside, map_ptr, 1)
                tl.store(scales_1_ptr + state_block, scales, mask=rows < n_rows)
            else:
                new_1 = rounded(state_1, bits, 2, NOISE, S)
            tl.store(s1_ptr + element, new_1, mask=inside)

    if UNITS == 1:
        part = partial_ptr + tile_row * n_cols + cols  # columns are units
        total = tl.sum(signed, 0, keep_dims=True).to(tl.float64)
        tl.store(part, total, mask=inside_cols)
        total = tl.sum(squared, 0, keep_dims=True).to(tl.float64)
        tl.store(part + all_parts, total, mask=inside_cols)
