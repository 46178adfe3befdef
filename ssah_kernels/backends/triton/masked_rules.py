"""Device side: what AdamW and SGD do to an element; specified in ``reference/``.

    AdamW  w decay - step_size m / (sqrt(v) inverse_bias + eps)    SGD  w - lr g

Whatever is the same for all elements is computed once, in float64, before the first of them: of
step 1 with beta2 = 0.999, inverse_bias is 1 / sqrt(1 - 0.999) = 31.6, and float32 has 4 digits of
1 - 0.999 alone. An element in float32 costs 12 instructions, of which two are approximations of
the hardware: a square root, and a square root's reciprocal (an error of 2^-22.9 each).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from math import inf, log

import triton
import triton.language as tl

from .activations import reciprocal
from .masked_table import hyper


def adamw_head(beta1: float, beta2: float, eps: float, weight_decay: float) -> tuple[float, ...]:
    """The numbers of a call that `adamw` finds in the head of the table."""
    # beta^t is exp(t ln beta): the step is on the device, and Triton has no power of its own.
    logs = (log(b) if b > 0 else -inf for b in (beta1, beta2))
    return (*logs, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, beta1)


@triton.jit
def adamw_scalars(table_ptr, lr, step, scale, X: tl.constexpr):
    """What `adamw` takes, of the table's head: ln beta1, ln beta2, 1 - beta1, beta2, 1 - beta2,
    eps, weight decay, beta1. The gradient's ``scale`` is in what gradients are multiplied by, and
    never squared: float32 does not hold the square of a factor that clips 1e21."""
    decay = 1 - lr * hyper(table_ptr, 6)
    step_size = lr / (1 - tl.exp(step * hyper(table_ptr, 0)))
    inverse_bias = 1 / tl.sqrt(1 - tl.exp(step * hyper(table_ptr, 1)))
    beta1, to_m = hyper(table_ptr, 7).to(X), (scale * hyper(table_ptr, 2)).to(X)
    beta2, to_root_v = hyper(table_ptr, 3).to(X), (scale * tl.sqrt(hyper(table_ptr, 4))).to(X)
    eps = hyper(table_ptr, 5).to(X)
    return decay.to(X), step_size.to(X), inverse_bias.to(X), beta1, to_m, beta2, to_root_v, eps


@triton.jit
def adamw(w, g, m, v, scalars):
    """(w, m, v) after a step by the gradient ``g`` before it is scaled."""
    decay, step_size, inverse_bias, beta1, to_m, beta2, to_root_v, eps = scalars
    root = to_root_v * g
    m = beta1 * m + to_m * g  # beta1 0: exactly g
    v = beta2 * v + root * root
    return w * decay - step_size * m * reciprocal(tl.sqrt(v) * inverse_bias + eps), m, v


@triton.jit
def sgd_scalars(table_ptr, lr, step, scale, X: tl.constexpr):
    """What `sgd` takes, of the table's head: momentum, 1 - dampening, weight_decay."""
    momentum, rest = hyper(table_ptr, 0).to(X), hyper(table_ptr, 1).to(X)
    return lr.to(X), scale.to(X), momentum, rest, hyper(table_ptr, 2).to(X), step == 1


@triton.jit
def rule_scalars(table_ptr, lr, step, scale, RULE: tl.constexpr, X: tl.constexpr):
    """What is the same for all elements of a step, for ``adamw`` or ``sgd``."""
    if RULE == "adamw":
        return adamw_scalars(table_ptr, lr, step, scale, X)
    else:
        return sgd_scalars(table_ptr, lr, step, scale, X)


@triton.jit
def sgd(w, g, b, scalars, STATES: tl.constexpr, NESTEROV: tl.constexpr):
    """(w, b) after a step by the gradient ``g`` before it is scaled."""
    lr, scale, momentum, rest, weight_decay, first = scalars
    # An infinite weight times a decay of 0 is NaN.
    g = scale * g + tl.where(weight_decay == 0, 0, weight_decay * w)
    if STATES > 0:
        b = tl.where(first, g, momentum * b + rest * g)
        g = g + momentum * b if NESTEROV else b
    return w - lr * g, b
