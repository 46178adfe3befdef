"""Device side of state in 8 bits: blocks of 256 elements of a row, with a scale each.

    x = values[code] * scale                       read
    scale = max |x|;  code = nearest(x / scale)    written

``dynamic_map.py`` specifies it to the bit, with an example. A table has the values of both maps,
[2, 256], and where their codes begin, [2, 2817]: 24 KiB, which stay in the L1 cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from ... import dynamic_map

BLOCK = tl.constexpr(dynamic_map.BLOCK)
FIRST_START = tl.constexpr(dynamic_map.FIRST_START)
STARTS = tl.constexpr(dynamic_map.STARTS)


@triton.jit
def read_codes(codes, scales, map_ptr, WHICH: tl.constexpr):
    """Float32 of ``codes`` [rows, 256] and ``scales`` [rows, 1]; WHICH: the first or second map."""
    values = map_ptr.to(tl.pointer_type(tl.float32)) + WHICH * 256
    return tl.load(values + codes.to(tl.int32)) * scales


@triton.jit
def nearest_codes(x, inside, map_ptr, WHICH: tl.constexpr):
    """(codes, scales) of ``x`` [rows, 256], of which what is not ``inside`` does not exist."""
    x = tl.where(inside, x.to(tl.float32), 0.0)
    # As whole numbers, magnitudes are in order, and infinity and NaN are above them all.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)
    finite = largest < 0x7F800000
    scales = tl.where(finite, largest, 0x7FC00000).to(tl.float32, bitcast=True)
    word = tl.div_rn(x, tl.broadcast_to(scales, x.shape)).to(tl.int32, bitcast=True)
    magnitude = tl.where(finite & (largest > 0), word & 0x7FFFFFFF, 0)
    interval = tl.maximum((magnitude >> 16) - FIRST_START, 0)
    start = tl.load(map_ptr + 512 + WHICH * STARTS + interval)
    # Within an interval the upper halves of a number and of its bound are the same.
    code = (start >> 16) + tl.where((magnitude & 0xFFFF) > (start & 0xFFFF), 1, 0)
    code = tl.where(magnitude == 0, 0, code)
    if WHICH == 0:
        code = tl.where(word < 0, -tl.minimum(code, 127), code)  # no code is -1
    return (code & 0xFF).to(tl.uint8), scales
