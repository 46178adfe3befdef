"""Specification of ``channel_moments_``: running count, mean and M2 of every channel.

For the unmasked rows x_1 .. x_n of this call, with the state (N, mu, M2) of the earlier ones:

    mu_b = sum_i x_i / n                      M2_b = sum_i (x_i - mu_b)^2
    mu  <- mu + (mu_b - mu) n / (N + n)       M2  <- M2 + M2_b + (mu_b - mu)^2 N n / (N + n)
    N   <- N + n

(Chan, Golub, LeVeque 1979). The unbiased variance is M2 / (N - 1).

Example. After 0 and 2 the state is (2, 1, 2). A call with 4 alone has mu_b = 4 and M2_b = 0: mu
becomes 1 + 3 / 3 = 2 and M2 becomes 2 + 0 + 9 * 2 / 3 = 8. The variance of 0, 2, 4 is 8 / 2 = 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_rows(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """The rows of ``x`` [..., C] that count, in float64: [tokens, C]."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)  # [all tokens, C]
    if token_mask is not None:
        # Taken out, not multiplied by 0: a masked row may be NaN, and 0 * NaN is NaN.
        rows = rows[token_mask.reshape(-1)]  # [tokens, C]
    return rows.to(torch.float64)


def merge_moments_(
    count: Tensor,  # []
    mean: Tensor,  # [C]
    m2: Tensor,  # [C]
    n: Tensor,  # []
    batch_mean: Tensor,  # [C]
    batch_m2: Tensor,  # [C]
) -> None:
    """Merge (n, batch_mean, batch_m2) into the state in place, by Chan's formula."""
    total = count + n
    # Nothing merged into nothing stays nothing: 0 / 0 would make the state NaN.
    weight = torch.where(total > 0, n / total, torch.zeros_like(total))
    delta = batch_mean - mean
    m2 += batch_m2 + delta.square() * (count * weight)
    mean += delta * weight
    count += n


def channel_moments_(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None = None
) -> None:
    rows = select_rows(x, token_mask)  # [tokens, C]
    if rows.shape[0] == 0:
        return
    batch_mean = rows.mean(0)
    # Two passes: sum(x^2) - n mean^2 would lose every digit where the mean is large.
    batch_m2 = (rows - batch_mean).square().sum(0)  # [C]
    merge_moments_(count, mean, m2, count.new_tensor(float(rows.shape[0])), batch_mean, batch_m2)
