"""Triton ``masked_grad_norm``: Euclidean norm of the gradient of the trained elements of a list.

    norm = sqrt(sum over tensors and their trained elements of g^2) / grad_scale

grads: matrices of any strides, in one dtype; norm: float64 []. Two launches for each way of access
(vectors, gathered columns, single elements).
Accumulation: squares and sums in float64, so that nothing overflows.
Bytes per trained element: itemsize read (2 for bf16).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import wide
from .launch import WARPS, Launch, run
from .masked_list import (
    TYPES,
    cdiv,
    device_table,
    tile_of,
    vector_of,
)
from .masked_table import find_row, pointer, scalar_or_one

FIELDS = 8  # first program, gradient, index, indexed rows, rows, columns, row and column stride


@triton.jit(do_not_specialize=["n_tensors", "first_part"])
def masked_grad_norm_kernel(
    table_ptr, partial_ptr, n_tensors, first_part,
    G: tl.constexpr, VECTOR: tl.constexpr, GATHER: tl.constexpr, FIELDS: tl.constexpr,
    STEPS: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_ptr = find_row(table_ptr, n_tensors, 0, FIELDS)
    g_ptr = pointer(row_ptr, 1, G, VECTOR)
    index_ptr = pointer(row_ptr, 2, tl.int64, 1)
    n_rows = tl.load(row_ptr + 4)
    n_cols = tl.load(row_ptr + 5) * VECTOR
    row_stride = tl.load(row_ptr + 6) * VECTOR
    tile = tl.program_id(0) - tl.load(row_ptr)
    blocks = tl.cdiv(n_cols, BLOCK)
    cols = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside_cols = cols < n_cols
    if GATHER:
        cols = tl.load(index_ptr + cols, mask=inside_cols, other=0)
    if VECTOR == 1:
        cols *= tl.load(row_ptr + 7)
    squares = tl.zeros((HEIGHT, BLOCK), tl.float64)
    tile_row = tile // blocks
    steps = tl.minimum(tl.cdiv(n_rows - tile_row * (STEPS * HEIGHT), HEIGHT), STEPS)
    indexed_rows = tl.load(row_ptr + 3)
    for i in range(0, steps.to(tl.int32)):
        rows = (tile_row * STEPS + i) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
        inside = (rows < n_rows) & inside_cols
        if not GATHER:
            indexed = rows < indexed_rows  # all of them or none
            rows = tl.where(indexed, tl.load(index_ptr + rows, mask=indexed, other=0), rows)
        g = tl.load(g_ptr + rows * row_stride + cols, mask=inside, other=0)
        g = wide(g).to(tl.float64)
        # [HEIGHT, BLOCK], added up across the tile at the end alone.
        squares += g * g
    total = tl.sum(tl.sum(squares, 1), 0)
    tl.store(partial_ptr + first_part + tl.program_id(0), total)


@triton.jit(do_not_specialize=["parts"])
def norm_kernel(partial_ptr, norm_ptr, grad_scale_ptr, parts, BLOCK: tl.constexpr):
    """Stage 2, one program: the square root of the sum of the parts, in fixed order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + part, mask=part < parts, other=0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, 0)) / scalar_or_one(grad_scale_ptr))


def launches(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    grad_scale: Tensor | None,
    norm: Tensor,
) -> list[Launch]:
    tables: dict[tuple[int, bool], list[int]] = defaultdict(list)
    programs: dict[tuple[int, bool], int] = defaultdict(int)
    for grad, index, dim in zip(grads, indices, dims, strict=True):
        rows, cols = grad.shape
        if index is not None:
            rows, cols = (index.numel(), cols) if dim == 0 else (rows, index.numel())
        if rows * cols == 0:
            continue
        gather = index is not None and dim == 1
        # Neighbours of a gathered column lie anywhere: no vectors.
        vectors = not gather and grad.stride(1) == 1
        vector = vector_of([grad], cols, grad.stride(0)) if vectors else 1
        key, cut = (vector, gather), tile_of(vector)
        at = 0 if index is None else index.data_ptr()
        sizes = (
            0 if index is None or gather else rows,
            rows,
            cols // vector,
            grad.stride(0) // vector,
            grad.stride(1),
        )
        tables[key] += [programs[key], grad.data_ptr(), at, *sizes]
        programs[key] += cdiv(rows, cut["STEPS"] * cut["HEIGHT"]) * cdiv(cols, cut["BLOCK"])
    parts = sum(programs.values())
    partial = norm.new_empty(parts)
    result, first = [], 0
    for (vector, gather), table in tables.items():
        result.append(
            Launch(
                masked_grad_norm_kernel,
                (programs[vector, gather],),
                (device_table(table, norm.device), partial, len(table) // FIELDS, first),
                {
                    "G": TYPES[grads[0].dtype],
                    "VECTOR": vector,
                    "GATHER": gather,
                    "FIELDS": FIELDS,
                    **tile_of(vector),
                    "num_warps": WARPS,
                },
            )
        )
        first += programs[vector, gather]
    stage2 = Launch(
        norm_kernel, (1,), (partial, norm, grad_scale, parts), {"BLOCK": 1024, "num_warps": 8}
    )
    return [*result, stage2]


def masked_grad_norm(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    grad_scale: Tensor | None = None,
) -> Tensor:
    norm = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    run(launches(grads, indices, dims, grad_scale, norm), norm.device)
    return norm
