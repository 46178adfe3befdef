"""Specification of ``gated_product``: an FFN's act(gate) * up, under an arm for each token.

    h = round(act(gate) * up * factors[arm])     computed in float64, rounded once to gate's dtype

The activations are those of ``gated_moments``.

Example, of relu with two tokens of two channels and two arms. Under arm 1 channel 0 is off:

    gate    up     arm    factors    h
    1  2    3 4    0      1 1        3 8
    1 -2    3 4    1      0 1        0 0

A factor of 0 is a factor: 0 * infinity is NaN, as it would be in the product with a column of zeros
of the next projection, which is how ablation takes a channel out.
"""

from __future__ import annotations

from torch import Tensor

from .gated_moments import activation


def of_tokens(factors: Tensor, arm: Tensor, gate: Tensor) -> Tensor:
    """The factors of every token: [..., C], with 1 for those dimensions of ``gate`` [..., C] that
    ``arm`` does not have. ``factors``: [arms, C]."""
    chosen = factors[arm]  # [*arm, C]
    between = gate.dim() - chosen.dim()
    return chosen.view(*arm.shape, *[1] * between, factors.shape[-1])


def gated_product(
    gate: Tensor,  # [..., C]
    up: Tensor,  # [..., C]
    factors: Tensor,  # [arms, C]
    arm: Tensor,  # [...], or the first dimensions of it
    *,
    act: str = "silu",
) -> Tensor:
    product = activation(gate.double(), act) * up.double()
    product = product * of_tokens(factors.double(), arm, gate)
    return product.to(gate.dtype).contiguous()
