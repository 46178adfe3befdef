"""The activations of gated_moments and their derivatives, in the type of their argument.

s = 1 / (1 + exp(-t))                      tanh(t) = 2 / (1 + exp(-2 t)) - 1
silu z s(z); gelu z Phi(z), Phi(z) = erfc(-z / sqrt 2) / 2;
gelu_tanh z s(2 y) with y = sqrt(2 / pi) (z + 0.044715 z^3);
relu max(z, 0); relu2 max(z, 0)^2
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
LOG2_E = tl.constexpr(1.4426950408889634)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def reciprocal(x):
    """1 / x of x >= 0. In float32 a division is 8 instructions, and this is 2: the error of a
    reciprocal square root, 2^-22.9 of the result, counts twice."""
    if x.dtype == tl.float64:
        return 1 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def exponential(t):
    """exp(t). In float32 exp spends four instructions on results below 1e-38, which are 0 here."""
    if t.dtype == tl.float64:
        return tl.exp(t)
    else:
        return tl.exp2(t * LOG2_E)


@triton.jit
def sigmoid(t):
    return reciprocal(1 + exponential(-t))


@triton.jit
def sigmoid_and_rest(t):
    """(s, 1 - s). In float32 the difference would lose the digits of a rest that is small: where
    exp(-t) is 1e-4, it is 1e-4 s, and 1 - s has three digits."""
    if t.dtype == tl.float64:
        s = sigmoid(t)
        return s, 1 - s
    else:
        e = exponential(-t)
        s = reciprocal(1 + e)
        return s, tl.minimum(e, 1e38) * s  # s is 0 where e is infinite, and the two would be NaN


@triton.jit
def normal_cdf(z):
    """Phi(z). In float32 1 + erf would lose the digits of the tail, and Triton has no erfc: it is
    t exp(polynomial(t) - z^2 / 2) with t = 1 / (1 + |z| / sqrt 8), as on the CPU."""
    if z.dtype == tl.float64:
        return 0.5 * (1 + tl.erf(z * SQRT_HALF))
    else:
        t = reciprocal(1 + tl.abs(z) * 0.35355339)
        p = 0.157751014 * t - 0.750181577
        p = p * t + 1.31865295
        p = p * t - 0.909740673
        p = p * t + 0.0943214269
        p = p * t - 0.0902556585
        p = p * t + 0.0652326508
        p = p * t + 0.380354122
        p = p * t + 0.999348078
        p = p * t - 1.26548227
        tail = 0.5 * t * exponential(p - 0.5 * z * z)
        return tl.where(z < 0, tail, 1 - tail)


@triton.jit
def activation(z, ACT: tl.constexpr):
    """act(z)."""
    if ACT == "silu":
        return z * sigmoid(z)
    elif ACT == "gelu":
        return z * normal_cdf(z)
    elif ACT == "gelu_tanh":
        return z * sigmoid((z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI)
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu2")
        positive = tl.where(z < 0, 0.0, z)  # not maximum, which drops a NaN
        return positive if ACT == "relu" else positive * positive


@triton.jit
def activation_and_slope(z, ACT: tl.constexpr):
    """(act(z), act'(z))."""
    if ACT == "silu":
        s, rest = sigmoid_and_rest(z)
        return z * s, s * (1 + z * rest)
    elif ACT == "gelu":
        phi = normal_cdf(z)
        return z * phi, phi + z * exponential(-0.5 * z * z) * INV_SQRT_2PI
    elif ACT == "gelu_tanh":
        s, rest = sigmoid_and_rest((z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI)
        # From there on s is 0 or 1, and a slope of infinity times 0 would be NaN.
        square = tl.minimum(z * z, 1e4)
        return z * s, s + z * s * rest * ((1 + square * (3 * CUBIC)) * TWO_SQRT_2_OVER_PI)
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu2")
        positive = tl.where(z < 0, 0.0, z)
        step = tl.where(z <= 0, 0.0, 1.0).to(z.dtype)  # of NaN 1, as in torch
        if ACT == "relu":
            return positive, step
        else:
            return positive * positive, 2 * positive
