"""Several choices of weights made into one: what one has and not the other, what many have.

Example: the weights 1, 2 and 3 are high for safety, and 3 and 4 for utility. What matters for
safety alone is 1 and 2. Of the choices {1, 2}, {2, 3} and {2} the weight 2 is in all three, and no
other one is in two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ssah.attribution.weights.result import WeightAttribution
from ssah.models import check_same_weights
from ssah.units import BitMask


def set_difference(
    safety: WeightAttribution,
    utility: WeightAttribution,
    safety_share: float,
    utility_share: float,
    *,
    per: str = "matrix",
) -> dict[str, BitMask]:
    """The weights that matter for safety and not for utility.

    Those of the ``safety_share`` with the highest scores on safety, less those of the
    ``utility_share`` with the highest scores on utility.

    Args:
        safety, utility: scores of one model under one metric, on two sets of data.
        safety_share, utility_share: from 0 to 1, as of :meth:`WeightAttribution.top`.
        per: what is ranked together. The paper ranks each row; its code, each matrix.

    Returns:
        Name of a parameter -> its weights.

    Raises:
        ValueError: the two are of other weights, metrics or parameters, or of the same data; a
            share or ``per`` is none.

    Source: Wei et al. 2024, arXiv 2402.05162, section 3: S(p, q), with q for safety, p for utility.
    """
    check_same_weights(
        safety.weights_hash,
        utility.weights_hash,
        "safety and utility",
        "score both sets with one call of load_model",
    )
    for what, first, second in (
        ("metric", safety.metric, utility.metric),
        ("parameters", set(safety.scores), set(utility.scores)),
    ):
        if first != second:
            raise ValueError(
                f"safety and utility differ in {what} ({first!r:.80} and {second!r:.80}); they "
                "must be of one"
            )
    if safety.data_fingerprint == utility.data_fingerprint:
        raise ValueError("safety and utility were scored on the same data; they must be of two")
    kept = safety.top(safety_share, per)
    general = utility.top(utility_share, per)
    return {param: mask - general[param] for param, mask in kept.items()}


def consistent(
    choices: Sequence[Mapping[str, BitMask]], at_least: int | None = None
) -> dict[str, BitMask]:
    """The weights that are in many of several choices, for instance of one prompt each.

    Args:
        choices: of one model.
        at_least: in how many of them; by default in all.

    Raises:
        ValueError: there is no choice, they are over other parameters, or ``at_least`` is not from
            1 to their number.

    Source: Zhao et al., ICLR 2025 (SN-Tune keeps what is chosen for every prompt, there of rows).
    """
    if not choices or any(each.keys() != choices[0].keys() for each in choices):
        raise ValueError("choices must be one or more, all over the same parameters")
    least = len(choices) if at_least is None else at_least
    if not 1 <= least <= len(choices):
        raise ValueError(f"at_least is {at_least}; it must be from 1 to {len(choices)}")
    found = {}
    for param in choices[0]:
        masks = [each[param] for each in choices]
        # reached[k]: the weights that are in k + 1 of the choices so far, or in more.
        reached = [masks[0] - masks[0]] * least
        for mask in masks:
            for k in range(least - 1, 0, -1):
                reached[k] |= reached[k - 1] & mask
            reached[0] |= mask
        found[param] = reached[-1]
    return found
