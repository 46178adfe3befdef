"""Optimiser state in 8 bits: the dynamic map, and blocks of 256 elements with a scale each.

    y = x / max |x| of its block                 code: the nearest value of the map to y
    x is read back as float32(value of its code) * scale, with scale = max |x|

The map (Dettmers et al., arXiv 2110.02861, section 2.2) has seven decades, of which each has twice
as many values as the one below it. Decade i from 0 to 6 ends at 10^(i-6). It is cut into n = 2^i
equal parts (2^(i+1) in the map without signs), whose middles are the values:

    10^(i-6) (0.1 + 0.9 (k + 0.5) / n)           for k from 0 to n - 1; and 0, and 1

With signs there are 127 such values, their negatives, 0 and 1; without signs 254, 0 and 1. Either
map has 256.

    code     with signs                          without signs
    0        0                                   0
    1 ..     the values in order, up to 128: 1   the values in order, up to 255: 1
    129 ..   -127 th, ... , -1 st value          (none)

A value halfway between two others goes to the one nearer to zero. There is one exception: without
signs, whatever is greater than zero has a code greater than zero. A weight's step divides by the
root of the second moment, so that one which became 0 would send the weight far away.

An example: of a block [0.5, -0.25, 0.001] the scale is 0.5 and y is [1, -0.5, 0.002]. The values
nearest to y are 1, -0.5008 and 0.0018, so that the block reads back as [0.5, -0.2504, 0.0009].

Blocks lie in the rows of the compact matrix: a row of 600 elements has blocks of 256, 256 and 88.
None goes on in the next row, so that ranks which hold different rows compute the same numbers. A
block that holds an infinity or a NaN reads back as NaN. A block of zeros has the scale 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
DECADES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # where each ends


class DynamicMap(NamedTuple):
    """What the codes mean.

    Attributes:
        values: float32 [256], of every code.
        bounds: float32 [magnitudes - 1]: magnitude i is the nearest from above bounds[i - 1] on.
        most_negative: the largest magnitude that a negative value may have; 0 without signs.
    """

    values: Tensor
    bounds: Tensor
    most_negative: int


@cache
def dynamic_map(*, signed: bool) -> DynamicMap:
    """The map of first moments (``signed``), or of second moments."""
    magnitudes = [0.0]
    for i, end in enumerate(DECADES):
        n = 1 << i if signed else 2 << i
        magnitudes += [end * (0.1 + 0.9 * (k + 0.5) / n) for k in range(n)]
    magnitudes.append(1.0)
    positive = torch.tensor(magnitudes, dtype=torch.float32)  # [129], or [256] without signs
    exact = positive.double()
    bounds = ((exact[1:] + exact[:-1]) / 2).float()
    if not signed:
        bounds[0] = 0  # see the exception above
        return DynamicMap(positive, bounds, 0)
    # Code 128 + i is -(128 - i): what a byte with a sign would hold.
    return DynamicMap(torch.cat([positive, -positive[1:128].flip(0)]), bounds, 127)


# Of a float32 the upper 16 bits are its interval: 2^-22 and all below the first, 1 in the last.
FIRST_START, STARTS = (127 - 22) << 7, (22 << 7) + 1


@cache
def starts(*, signed: bool) -> Tensor:
    """Int32 [2817], for kernels: of each interval of magnitudes where its nearest codes begin.

    The upper half of an entry is the magnitude nearest to the smallest number of the interval. Its
    lower half is that of the bound in the interval, which has one at most, or 0xffff. Of 0 the code
    is 0, whatever the first interval says.
    """
    bounds = dynamic_map(signed=signed).bounds.view(torch.int32)
    begin = (torch.arange(STARTS) + FIRST_START) << 16
    begin[0] = 1 if not signed else begin[0]  # the first interval has 0 as a bound of its own
    # Bits of positive numbers are in order, as the numbers are.
    magnitude = torch.searchsorted(bounds.long(), begin)
    bound = torch.cat([bounds, torch.tensor([-1], dtype=torch.int32)]).long()[magnitude]
    inside = bound >> 16 == torch.arange(STARTS) + FIRST_START
    return (magnitude << 16 | torch.where(inside, bound & 0xFFFF, 0xFFFF)).int()


def n_blocks(columns: int) -> int:
    """Blocks of a row of so many elements."""
    return -(-columns // BLOCK)


def scales_shape(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    """The shape of the scales of compact state of ``shape``, whose units run along ``dim``.

    State [200, 600] with units in its rows has scales [200, 3], and [4, 50, 600] with units in its
    last dimension [4, 50, 3].
    """
    if len(shape) < 2:
        return (1, n_blocks(shape[0] if shape else 1))  # one row
    if dim % len(shape) == 0:
        columns = 1
        for size in shape[1:]:
            columns *= size
        return (shape[0], n_blocks(columns))
    return (*shape[:-1], n_blocks(shape[-1]))


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Float32 [rows, columns] of ``codes`` [rows, columns] and ``scales`` [rows, blocks]."""
    values = dynamic_map(signed=signed).values.to(codes.device)[codes.long()]
    return values * scales.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


def quantize(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, scales) of float32 ``x`` [rows, columns]: uint8 [rows, columns], float32 [rows,
    blocks]."""
    rows, columns = x.shape
    _, bounds, most_negative = dynamic_map(signed=signed)
    blocks = torch.nn.functional.pad(x, (0, -columns % BLOCK))
    blocks = blocks.view(rows, n_blocks(columns), BLOCK)
    scales = blocks.abs().amax(2)  # [rows, blocks]; a NaN wins
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    y = blocks / scales[..., None]
    # Of a block of zeros y is NaN, as it is where the scale is: these have code 0.
    y = torch.where(y.isnan(), 0, y)
    codes = torch.searchsorted(bounds.to(x.device), y.abs().contiguous())
    if signed:
        codes = torch.where(y < 0, -codes.clamp(max=most_negative) % 256, codes)
    return codes.to(torch.uint8).flatten(1)[:, :columns].contiguous(), scales
