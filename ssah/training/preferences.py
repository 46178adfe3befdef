"""The preference loss (DPO): a chosen answer should gain on a rejected one, against a reference.

Rafailov et al. 2023, arXiv 2305.18290, equation 7. With summed log-probabilities of whole answers,
p under the policy and r under the reference, c of the chosen and j of the rejected one:

    loss = - mean over pairs of log sigmoid(beta ((p_c - r_c) - (p_j - r_j)))

Example: p_c - r_c = 1, p_j - r_j = -1 and beta = 0.5 give -log sigmoid(1) = 0.313. A policy that is
the reference has log 2 = 0.693.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> Tensor:
    """The loss of a batch of pairs, in nats: ``[]``, differentiable in what the policy gives.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: log-probabilities of
            the answers, summed over their tokens, nats: ``[pairs]`` each.
        beta: how much a nat counts; the larger, the closer the policy is kept.

    Raises:
        ValueError: the shapes differ, there is no pair, or ``beta`` is not above 0.
    """
    given = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    shapes = {tuple(each.shape) for each in given}
    # Broadcasting would compare every pair with every other one.
    if len(shapes) > 1 or policy_chosen.dim() != 1 or not len(policy_chosen):
        raise ValueError(
            f"log-probabilities are of the shapes {sorted(shapes)}; they must be [pairs], all four "
            "of the same pairs, at least one"
        )
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be above 0")
    gain = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # [pairs]
    return -F.logsigmoid(beta * gain).mean()
