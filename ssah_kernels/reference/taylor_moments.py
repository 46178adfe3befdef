"""Specification of ``taylor_moments_``: first-order importance of every channel.

For the unmasked rows a_i of the activation and g_i = dL/da_i of its gradient:

    signed  <- signed  + sum_i a_i g_i          |signed| is the loss change, to first order, when
    squared <- squared + sum_i (a_i g_i)^2      the channel is set to zero; squared is the
                                                (empirical) Fisher information of that change

Example. With a = (1, -2) and g = (3, 1) the products are 3 and -2: signed gets 1 and squared 13.
A channel whose tokens cancel has a small signed and a large squared sum.
"""

from __future__ import annotations

from torch import Tensor

from .channel_moments import select_rows


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> None:
    product = select_rows(x, token_mask) * select_rows(grad, token_mask)  # [tokens, C]
    signed += product.sum(0)
    squared += product.square().sum(0)
