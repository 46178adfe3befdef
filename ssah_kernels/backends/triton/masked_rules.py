"""Device side: what AdamW and SGD do to an element; specified in ``reference/``."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from math import inf, log

import triton
import triton.language as tl

from ssah_kernels.backends.triton.masked_table import hyper


def adamw_head(beta1: float, beta2: float, eps: float, weight_decay: float) -> tuple[float, ...]:
    """The numbers of a call that `adamw` finds in the head of the table."""
    # beta^t is exp(t ln beta): the step is on the device, and Triton has no power of its own.
    logs = (log(b) if b > 0 else -inf for b in (beta1, beta2))
    return (*logs, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, beta1)


@triton.jit
def adamw(w, g, m, v, table_ptr, lr, step, X: tl.constexpr):
    """Table's head: ln beta1, ln beta2, 1 - beta1, beta2, 1 - beta2, eps, weight decay, beta1."""
    decay = (1 - lr * hyper(table_ptr, 6)).to(X)
    step_size = (lr / (1 - tl.exp(step * hyper(table_ptr, 0)))).to(X)
    inverse_bias = (1 / tl.sqrt(1 - tl.exp(step * hyper(table_ptr, 1)))).to(X)
    m = hyper(table_ptr, 7).to(X) * m + hyper(table_ptr, 2).to(X) * g  # beta1 0: exactly g
    v = hyper(table_ptr, 3).to(X) * v + hyper(table_ptr, 4).to(X) * g * g
    denominator = tl.sqrt(v) * inverse_bias + hyper(table_ptr, 5).to(X)
    return w * decay - step_size * m / denominator, m, v


@triton.jit
def sgd(
    w, g, b, table_ptr, lr, step, STATES: tl.constexpr, NESTEROV: tl.constexpr, X: tl.constexpr
):
    """The table's head: momentum, 1 - dampening, weight_decay."""
    momentum = hyper(table_ptr, 0).to(X)
    weight_decay = hyper(table_ptr, 2).to(X)
    g += tl.where(weight_decay == 0, 0, weight_decay * w)  # an infinite weight times 0 is NaN
    if STATES > 0:
        b = tl.where(step == 1, g, momentum * b + hyper(table_ptr, 1).to(X) * g)
        g = g + momentum * b if NESTEROV else b
    return w - lr.to(X) * g, b
