"""Device side of the masked updates: noise and rounding, as ``reference/masked_update.py`` has it.

Per element: 32 random bits from a keyed permutation of the element's number, of which the
parameter and each state use 16; about 15 integer instructions.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

MULTIPLIER_0 = tl.constexpr(0x21F0AAAD)
MULTIPLIER_1 = tl.constexpr(0xD35A2D97)
KEY_0 = tl.constexpr(0x243F6A88)
KEY_1 = tl.constexpr(0x85A308D3)
GOLDEN = tl.constexpr(0x9E3779B1)


@triton.jit
def word(x, SHIFT: tl.constexpr):
    """Bits SHIFT .. SHIFT + 31 of an int64."""
    return ((x >> SHIFT) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def mix(x):
    x ^= x >> 16
    x = x * tl.full((), MULTIPLIER_0, tl.uint32)
    x ^= x >> 15
    x = x * tl.full((), MULTIPLIER_1, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def noise_key(KEY: tl.constexpr, seed, step, number):
    key = mix(tl.full((), KEY, tl.uint32) ^ word(seed, 0))
    key = mix(key ^ word(seed, 32))
    key = mix(key ^ word(step, 0))
    return mix(key ^ word(number, 0))


@triton.jit
def noise_keys(seed_ptr, step, number_ptr):
    """One stream of noise for each tensor and step; without a seed nothing reads the keys."""
    if seed_ptr is None:
        return KEY_0, KEY_1
    else:
        seed, number = tl.load(seed_ptr), tl.load(number_ptr)
        key_0 = noise_key(KEY_0, seed, step.to(tl.int64), number)
        return key_0, noise_key(KEY_1, seed, step.to(tl.int64), number)


@triton.jit
def noise(start, offset, key_0, key_1, FAR: tl.constexpr):
    """32 random bits for each element ``start + offset``, int64 and int32.

    FAR: there may be elements beyond 2^32. Their upper word joins, so that noise does not repeat.
    """
    if FAR:
        element = start + offset
        x = word(element, 0) + key_0
        key_1 += word(element, 32)
    else:
        x = word(start, 0) + offset.to(tl.uint32) + key_0
    x = (x ^ (x >> 16)) * tl.full((), MULTIPLIER_0, tl.uint32)
    x = (x ^ (x >> 15) ^ key_1) * tl.full((), MULTIPLIER_1, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def compensated(p, rest):
    """The weight of which ``p`` is a part: of bfloat16 float32 bits, the lower half in ``rest``."""
    if p.dtype == tl.bfloat16:
        upper = p.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return (upper + rest.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        return p.to(tl.float32) + rest.to(tl.float32)


@triton.jit
def split(w, P: tl.constexpr):
    """(p, rest) of the float32 weight ``w``: p to nearest in P, see :func:`compensated`."""
    if tl.bfloat16 == P:
        # NaNs have several patterns, of which some would round to -0.
        word = tl.where(w == w, w.to(tl.int32, bitcast=True), 0x7FC00000).to(
            tl.uint32, bitcast=True
        )
        word += 0x8000
        p = (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return p, ((word & 0xFFFF).to(tl.int32) - 0x8000).to(tl.int16)
    else:
        p = w.to(P)
        return p, (w - p.to(tl.float32)).to(P)


@triton.jit
def rounded(x, bits, WHICH: tl.constexpr, NOISE: tl.constexpr, DTYPE: tl.constexpr):
    """x in DTYPE: to nearest even, or, bfloat16 with noise, stochastically.

    WHICH names the 16 of the random bits: 0 for the parameter, 1 and 2 for the states.
    """
    if NOISE and tl.bfloat16 == DTYPE:
        if WHICH == 0:
            r = bits & 0xFFFF
        elif WHICH == 1:
            r = bits >> 16
        else:
            r = (bits * tl.full((), GOLDEN, tl.uint32)) >> 16
        pattern = x.to(tl.uint32, bitcast=True)
        # The lower half of infinity is 0, so that no r reaches its upper half. A NaN that
        # arithmetic made has a bit in the upper half, and stays one when the lower is cut off.
        pattern = tl.where(x == x, pattern + r, pattern)
        return (pattern >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
