"""Specification of ``gated_moments``: an FFN's act(gate) * up, and the moments of it.

    h = round(act(gate) * up)            computed in float64, rounded once to the inputs' dtype
    (count, mean, m2) <- merged with the moments of the unmasked rows of h (channel_moments_)

    silu       z / (1 + exp(-z))
    gelu       z / 2 erfc(-z / sqrt 2)           (1 + erf would lose the digits of the tail)
    gelu_tanh  z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))
    relu       max(z, 0)
    relu2      max(z, 0)^2

Masked rows of h are returned like any other; they only do not count.

Example, of silu with gate = 1 and up = 2. act(1) = 0.7311, so that h = 1.4621; act'(1) = 0.9277, so
that dL/dgate = 1.8553 dL/dh and dL/dup = 0.7311 dL/dh.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .channel_moments import channel_moments_


def activation(z: Tensor, act: str) -> Tensor:
    """act(z) [...], in z's dtype."""
    if act == "silu":
        return F.silu(z)
    if act == "gelu":
        return 0.5 * z * torch.erfc(z * -(0.5**0.5))
    if act == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return F.relu(z) if act == "relu" else F.relu(z).square()


def gated_moments(
    gate: Tensor,  # [..., C]
    up: Tensor,  # [..., C]
    count: Tensor,  # []
    mean: Tensor,  # [C]
    m2: Tensor,  # [C]
    token_mask: Tensor | None = None,  # [...]
    *,
    act: str = "silu",
) -> Tensor:
    output = (activation(gate.double(), act) * up.double()).to(gate.dtype)
    # Moments of the rounded values: these are what the down projection reads.
    channel_moments_(output, count, mean, m2, token_mask)
    return output.contiguous()


def gated_moments_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, act: str = "silu"
) -> tuple[Tensor, Tensor]:
    """dL/dgate = dL/dh up act'(gate) and dL/dup = dL/dh act(gate), [..., C] as all arguments.

    The rounding has slope 1.
    """
    with torch.enable_grad():  # operators run where no gradients are recorded
        leaves = [t.detach().double().requires_grad_() for t in (gate, up)]
        output = activation(leaves[0], act) * leaves[1]
    grads = torch.autograd.grad(output, leaves, grad.double())
    return grads[0].to(gate.dtype).contiguous(), grads[1].to(up.dtype).contiguous()
