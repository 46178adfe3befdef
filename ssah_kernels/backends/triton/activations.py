"""The activations of gated_moments and their derivatives, in the type of their argument.

s = 1 / (1 + exp(-t))                      tanh(t) = 2 / (1 + exp(-2 t)) - 1
silu z s(z); gelu z Phi(z); gelu_tanh z s(2 y) with y = sqrt(2 / pi) (z + 0.044715 z^3);
relu max(z, 0); relu2 max(z, 0)^2
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid(t):
    return 1 / (1 + tl.exp(-t))


@triton.jit
def activation(z, ACT: tl.constexpr):
    """act(z)."""
    if ACT == "silu":
        return z / (1 + tl.exp(-z))
    elif ACT == "gelu":
        return 0.5 * z * (1 + tl.erf(z * SQRT_HALF))
    elif ACT == "gelu_tanh":
        return z * sigmoid((z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI)
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu2")
        positive = tl.where(z > 0, z, z * 0)  # not maximum, which drops a NaN
        return positive if ACT == "relu" else positive * positive


@triton.jit
def activation_and_slope(z, ACT: tl.constexpr):
    """(act(z), act'(z))."""
    if ACT == "silu":
        s = sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    elif ACT == "gelu":
        phi = 0.5 * (1 + tl.erf(z * SQRT_HALF))
        return z * phi, phi + z * tl.exp(-0.5 * z * z) * INV_SQRT_2PI
    elif ACT == "gelu_tanh":
        s = sigmoid((z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI)
        return z * s, s + z * s * (1 - s) * ((1 + z * z * (3 * CUBIC)) * TWO_SQRT_2_OVER_PI)
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu2")
        positive = tl.where(z > 0, z, z * 0)
        step = tl.where(z > 0, 1.0, 0.0).to(z.dtype)
        if ACT == "relu":
            return positive, step
        else:
            return positive * positive, 2 * positive
