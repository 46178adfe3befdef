"""Host side of every Triton operator: rows out of strided tensors, tile sizes, launches.

A host function first builds its list of launches, then runs it. Tests build the same list and
compile it for any GPU, with the pointers' alignment and the constants of the real call.

How [rows, channels] is cut, for bfloat16 [4096, 11008] with depth 8:

    block   32 lanes x 16 bytes / 2 bytes = 256 channels        43 blocks
    tile    8 rows deep x 4 warps = 32 rows                     128 tiles, one below the other
    chunk   min(32, 128 x 43 / 768) = 7 tiles = 224 rows        19 chunks
    grid    19 x 43 = 817 programs, each of 4 warps
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import interpreted

VECTOR_BYTES = 16  # one ld.global.v4.b32 or v2.b64 per thread and row
LANES = 32  # a warp spans LANES * VECTOR_BYTES contiguous bytes of a row: 512
WARPS = 4  # each warp takes rows of its own: nothing crosses warps until a chunk ends
PROGRAMS = 768  # wanted in a launch: about six blocks of 128 threads on each of 132 multiprocessors
MAX_TILES = 32  # a chunk's float32 sums stay short
MERGE_CHUNKS, MERGE_CHANNELS = 16, 32  # the tile of stage 2


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``kernel[grid](*args, **keywords)``."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def keywords(self) -> dict[str, Any]:
        return {"enable_fp_fusion": True, **self.options}  # Triton's default changes in 3.10


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run the launches in order on the current stream of ``device``."""
    if device.type == "cpu" and not interpreted():
        raise RuntimeError(
            "the inputs are on the CPU; Triton's kernels need tensors on a GPU, or "
            "TRITON_INTERPRET=1 set before Python starts"
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch.kernel[launch.grid](*launch.args, **launch.keywords)


@dataclass(frozen=True)
class Tiling:
    """How [rows, channels] is cut; it depends on the shape and the dtype alone.

    A tile is [depth, WARPS, channels per block], a chunk is ``tiles`` tiles below each other, and
    a program takes one chunk. ``depth`` vectors are in flight per thread and input.
    """

    rows: int
    channels: int
    depth: int
    block: int
    tiles: int

    @property
    def chunks(self) -> int:
        return -(-self.rows // (self.depth * WARPS * self.tiles))

    @property
    def grid(self) -> tuple[int]:
        return (self.chunks * -(-self.channels // self.block),)

    @property
    def constants(self) -> dict[str, int]:
        return {"DEPTH": self.depth, "WARPS": WARPS, "BLOCK": self.block, "num_warps": WARPS}


def tiling(
    rows: int, channels: int, itemsize: int, depth: int, max_tiles: int = MAX_TILES
) -> Tiling:
    """The tiling of ``rows`` rows of ``channels`` channels of ``itemsize`` bytes each."""
    block = LANES * VECTOR_BYTES // itemsize
    tiles = -(-rows // (depth * WARPS)) * -(-channels // block)
    return Tiling(rows, channels, depth, block, max(1, min(max_tiles, tiles // PROGRAMS)))


def row_slices(tensors: Sequence[Tensor], mask: Tensor | None) -> list[tuple[Tensor, ...]]:
    """Cut tensors [..., C] of one shape, and a mask [...], into views [rows, C] (and [rows]).

    Leading dimensions are merged wherever all the strides allow; usually one slice is left. The
    order of the rows may change: no operator depends on it. No data is copied.
    """
    lead = tensors[0].shape[:-1]
    views = [*tensors, mask] if mask is not None else [*tensors]
    # A dimension of 1 has no second element for its stride to lead to.
    dims = [(size, tuple(v.stride(d) for v in views)) for d, size in enumerate(lead) if size != 1]
    groups: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in sorted(dims, key=lambda d: d[1], reverse=True):
        # From the largest stride down: the outer one must step over all of the inner one.
        if groups and groups[-1][1] == tuple(s * size for s in strides):
            groups[-1] = (groups[-1][0] * size, strides)
        else:
            groups.append((size, strides))
    groups.sort(key=lambda g: g[0])  # the longest run becomes the rows of a launch
    rows, strides = groups.pop() if groups else (1, (0,) * len(views))
    slices = []
    for index in product(*(range(size) for size, _ in groups)):
        views_of_slice = []
        for i, view in enumerate(views):
            offset = sum(k * g[1][i] for k, g in zip(index, groups, strict=True))
            channel = ((view.shape[-1],), (1,)) if view is not mask else ((), ())
            shape, stride = (rows, *channel[0]), (strides[i], *channel[1])
            views_of_slice.append(view.as_strided(shape, stride, view.storage_offset() + offset))
        slices.append(tuple(views_of_slice))
    return slices


def count_rows_(x: Tensor, mask: Tensor | None, count: Tensor) -> None:
    """Add the unmasked rows of an x [..., 0]: it may have rows (mask [...]), but no channels."""
    count.add_(prod(x.shape[:-1]) if mask is None else mask.sum())
