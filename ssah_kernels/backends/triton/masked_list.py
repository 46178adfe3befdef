"""Host side of the masked updates: tables of tensors, one launch for all accessed alike.

Take a Llama of which some units train. Rows of gate, up, V and of the packed down projection train,
read by vectors of 16 bytes; of O it is columns, gathered one by one. So a step of the whole model
is two launches, each with a table of addresses, shapes and strides. A program finds its tensor in
the table by the number of the tensor's first program.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ... import dynamic_map
from .launch import (
    LANES,
    MERGE_CHANNELS,
    MERGE_CHUNKS,
    VECTOR_BYTES,
    WARPS,
    Launch,
)
from .masked_table import FIELDS, HEAD, add_importance_kernel
from .masked_update import masked_update_kernel

TILE_ROWS = 32
TILE_ROWS_SUMMED = 128  # fewer partial sums where every column is a unit
SCALAR_BLOCK = 512  # columns where there are no vectors: four elements per thread
UNIT_FIELDS = 6  # of a row of add_importance_kernel's table
# With sums per unit, ptxas aims at an occupancy for which it spills some registers, unless told. An
# element of float64 takes two.
REGISTERS, WIDE_REGISTERS = 160, 192
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,  # codes, of state alone
}


@dataclass(frozen=True)
class Update:
    """Arguments of a masked update: per tensor, then shared. ``states`` and ``remainders`` are
    contiguous compact matrices, and so are ``grads``, unless they have the parameter's shape;
    ``params`` are matrices of any strides."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    indices: Sequence[Tensor | None]
    dims: Sequence[int]
    lr: Tensor
    step: Tensor
    grad_scale: Tensor | None
    clip_coef: Tensor | None
    seed: Tensor | None
    remainders: Sequence[Tensor] | None
    signed: Sequence[Tensor] | None
    squared: Sequence[Tensor] | None
    scales: Sequence[Sequence[Tensor]] = ()  # of states in 8 bits, one list for each state
    found_inf: Tensor | None = None

    def shape(self, i: int) -> tuple[int, int]:
        """Rows and columns of what trains of tensor ``i``."""
        rows, cols = self.params[i].shape
        index = self.indices[i]
        if index is None:
            return rows, cols
        return (index.numel(), cols) if self.dims[i] == 0 else (rows, index.numel())


@cache
def device_maps(device: torch.device) -> Tensor:
    """The maps of state in 8 bits, as ``masked_codes`` reads them: int32 [2 * (256 + 2817)]."""
    values = [dynamic_map.dynamic_map(signed=s).values.view(torch.int32) for s in (True, False)]
    starts = [dynamic_map.starts(signed=s) for s in (True, False)]
    return torch.cat([*values, *starts]).to(device)


def device_table(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 table [values] on ``device``; the copy does not wait for the GPU.

    Raises:
        RuntimeError: the current stream is captured. A replayed graph would copy again from the
            memory of this call, which is free by then.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "masked updates and masked_grad_norm copy a table from the host, which a "
            "CUDA graph cannot: call them outside torch.cuda.graph"
        )
    # Pinned, which torch keeps until the copy is done: from other memory it might be awaited.
    table = torch.tensor(values, dtype=torch.int64)
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def bits(value: float) -> int:
    """The bits of a float64."""
    return struct.unpack("q", struct.pack("d", value))[0]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def is_far(elements: int) -> bool:
    """Whether the number of an element may need more than 32 bits: one more word of noise."""
    return elements > 2**32


def vector_of(tensors: Sequence[Tensor], *sizes: int) -> int:
    """Elements of a 16-byte vector, if pointers (of tensors [...]) and sizes allow it; else 1."""
    vector = VECTOR_BYTES // tensors[0].element_size()
    aligned = all(t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)
    return vector if aligned and all(size % vector == 0 for size in sizes) else 1


def tile_of(vector: int, units: int = -1, *, codes: bool = False) -> dict[str, int]:
    """How a tile is cut: a row per warp and step with vectors, else a row per step for the block.

    The two keep a thread's elements in as many rows as its registers have addresses for: one. With
    state in ``codes``, a row of a tile is a block of these.
    """
    height, block = (WARPS, LANES * vector) if vector > 1 else (1, SCALAR_BLOCK)
    if codes:
        block = dynamic_map.BLOCK
        # Eight elements of float64 in a thread would not fit into its registers: two warps a row.
        height = max(1, height // 2) if vector == 2 else height
    rows = TILE_ROWS_SUMMED if units == 1 else TILE_ROWS
    return {"STEPS": rows // height, "HEIGHT": height, "BLOCK": block}


class Access(NamedTuple):
    """What a launch is specialised for: constants of the kernel, in capitals there."""

    vector: int
    gather: bool
    units: int
    through_index: bool
    far: bool  # an element's number may take more than 32 bits


def how_accessed(update: Update, i: int) -> Access:
    """How tensor ``i`` is accessed."""
    param, grad, dim = update.params[i], update.grads[i], update.dims[i]
    gather = update.indices[i] is not None and dim == 1
    units = dim if update.signed is not None else -1
    through_index = grad.shape != update.shape(i)
    far = is_far(prod(update.shape(i)))
    strided = [param, grad] if through_index else [param]
    if gather or any(t.stride(1) != 1 for t in strided):  # no neighbours to load together
        return Access(1, gather, units, through_index, far)
    tensors = [param, grad, *(s[i] for s in update.states)]
    if update.remainders is not None:
        tensors.append(update.remainders[i])
    vector = vector_of(tensors, param.shape[1], *(t.stride(0) for t in strided))
    return Access(vector, gather, units, through_index, far)


def tensor_row(update: Update, i: int, first: int, vector: int, gather: bool) -> list[int]:
    """One row of the table, but for the last two fields."""
    param, grad, index = update.params[i], update.grads[i], update.indices[i]
    rows, cols = update.shape(i)
    states = [s[i].data_ptr() for s in update.states]
    scales = [s[i].data_ptr() for s in update.scales]
    return [
        first,
        param.data_ptr(),
        grad.data_ptr(),
        *states,
        *[0] * (2 - len(states)),  # SGD has one or none: addresses that nothing reads
        *scales,
        *[0] * (2 - len(scales)),
        0 if update.remainders is None else update.remainders[i].data_ptr(),
        0 if index is None else index.data_ptr(),
        0 if index is None or gather else rows,
        rows,
        cols // vector,  # the kernel multiplies again, and so knows the factor
        param.stride(0) // vector,
        param.stride(1),
        grad.stride(0) // vector,
        grad.stride(1),
        i,
    ]


@dataclass
class _UnitSums:
    """Where tensors leave the partial sums of their units: [2, parts, units] of each, in turn."""

    table: list[int] = field(default_factory=list)  # a row of UNIT_FIELDS for each tensor
    size: int = 0  # of all partial sums, in elements
    programs: int = 0  # of the launch that adds them up

    def add(self, update: Update, i: int, units: int, tiles: tuple[int, int]) -> list[int]:
        """The last two fields of tensor ``i``'s row: where its sums begin, and its parts."""
        # Rows are units: each tile beside another has a part of the sum; columns: each below.
        parts = tiles[1] if units == 0 else tiles[0]
        fields = [self.size, parts]
        if update.signed is not None and update.squared is not None:
            sums = update.signed[i].data_ptr(), update.squared[i].data_ptr()
            n_units = update.shape(i)[units]
            self.table += [self.programs, *sums, self.size, parts, n_units]
            self.programs += cdiv(n_units, MERGE_CHANNELS)
            self.size += 2 * parts * n_units
        return fields


def _rows(
    update: Update, access: Access, members: Sequence[int], sums: _UnitSums
) -> tuple[list[int], int]:
    """The rows of one launch's table, and its number of programs."""
    vector, units = access.vector, access.units
    cut = tile_of(vector, units, codes=bool(update.scales))
    result: list[int] = []
    programs = 0
    for i in members:
        rows, cols = update.shape(i)
        tiles = cdiv(rows, cut["STEPS"] * cut["HEIGHT"]), cdiv(cols, cut["BLOCK"])
        result += tensor_row(update, i, programs, vector, access.gather)
        result += sums.add(update, i, units, tiles)
        programs += tiles[0] * tiles[1]
    assert len(result) == FIELDS.value * len(members)
    return result, programs


def _registers(dtype: torch.dtype) -> dict[str, int]:
    """The most registers of a thread that has sums per unit, as an option of the compiler."""
    if torch.version.hip is not None:
        return {}
    return {"maxnreg": WIDE_REGISTERS if dtype == torch.float64 else REGISTERS}


def launches(
    rule: str, hyper: Sequence[float], update: Update, nesterov: bool, maximize: bool
) -> list[Launch]:
    """The launches of one update.

    One for all tensors that are accessed alike (usually one or two: rows and packed columns,
    gathered columns), and one that adds importance if it is asked for.
    """
    device = update.params[0].device
    groups: dict[Access, list[int]] = defaultdict(list)
    for i in range(len(update.params)):
        if prod(update.shape(i)):
            groups[how_accessed(update, i)].append(i)
    head = [*map(bits, hyper), *[0] * (HEAD.value - len(hyper))]
    sums = _UnitSums()
    tables = [(each, *_rows(update, each, members, sums)) for each, members in groups.items()]

    # One for all launches, once its size is known.
    partial = torch.empty(sums.size, dtype=torch.float64, device=device)
    options: dict[str, Any] = {
        "RULE": rule,
        "STATES": len(update.states),
        "NESTEROV": nesterov,
        "MAXIMIZE": maximize,
        "COMPENSATED": update.remainders is not None,
        "P": TYPES[update.params[0].dtype],
        "G": TYPES[update.grads[0].dtype],
        "S": TYPES[update.states[0][0].dtype] if update.states else tl.float32,
        "num_warps": WARPS,
    }
    maps = device_maps(device) if update.scales else None
    scalars = (update.lr, update.step, update.grad_scale, update.clip_coef, update.seed)
    shared = (*scalars, update.found_inf, maps)
    result = []
    for access, rows, programs in tables:
        table = device_table([*head, *rows], device)
        args = (table, partial, *shared, len(rows) // FIELDS.value)
        cut = tile_of(access.vector, access.units, codes=maps is not None)
        special = {name.upper(): value for name, value in access._asdict().items()} | cut
        if access.units >= 0:
            special |= _registers(update.params[0].dtype)
        result.append(Launch(masked_update_kernel, (programs,), args, {**options, **special}))
    if sums.table:
        table = device_table(sums.table, device)
        fields = {"FIELDS": UNIT_FIELDS, "CHUNKS": MERGE_CHUNKS, "BLOCK": MERGE_CHANNELS}
        n_tensors = len(sums.table) // UNIT_FIELDS
        stage2 = (table, partial, update.grad_scale, update.found_inf, n_tensors)
        result.append(
            Launch(add_importance_kernel, (sums.programs, 2), stage2, {**fields, "num_warps": 4})
        )
    return result
