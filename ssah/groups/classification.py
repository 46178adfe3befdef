"""``classify``: sorting units into safety-critical, utility-critical, redundant and complex ones.

Units are ranked by two attributions, one measured on a safety set (I_S) and one on a utility set
(I_U). Redundant units are chosen first, then safety-critical, then utility-critical ones, each from
what is left; the rest is complex (Li & Kim, arXiv 2410.10862, section 4).

Example: four units, a quarter of them for each of the three groups, scores not normalised.

    unit                      0     1     2     3
    I_S                       9     1     5     4
    I_U                       1     1     9     5
    I_S + I_U                10     2    14     9      lowest: unit 1 is RU
    I_S - I_U, of the rest    8          -4    -1      highest: unit 0 is SCU
                                         -4    -1      lowest: unit 2 is UCU; unit 3 is left, CU
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssah.attribution import Attribution
from ssah.choices import Normalize, Scope, check_choice
from ssah.groups.checks import (
    GROUPS,
    NORMALIZATIONS,
    SCOPES,
    SLACK,
    check_same_modules,
    checked_scores,
    fraction_of,
    sizes_of,
)
from ssah.groups.unit_groups import UnitGroups
from ssah.models import check_same_weights
from ssah.units import UnitSet, blocks, lowest, normalized, share_count, split, without


def classify(
    safety: Attribution | Mapping[str, Tensor],
    utility: Attribution | Mapping[str, Tensor],
    *,
    scu: float,
    ucu: float,
    ru: float,
    scope: Scope = "model",
    normalize: Normalize = "zscore",
) -> UnitGroups:
    """Sort every unit into one of four groups by its importance for safety and for utility.

    A share f of a scope with n units is floor(f * n + 0.5) units. Redundant units are the lowest
    I_S + I_U; of the rest, safety-critical units are the highest I_S - I_U; of the rest,
    utility-critical units are the lowest I_S - I_U; complex units are what is left. Ties go to the
    lower index: model order of modules, then unit index. Where rounding asks for more than is
    left, a group takes what is left.

    Args:
        safety, utility: I_S and I_U, as `attribute` returns them, or plain mappings of B's name to
            scores [n_units]. Modules are taken in the order of `safety`.
        scu, ucu, ru: shares of safety-critical, utility-critical and redundant units, fractions
            in [0, 1] of all units, at most 1 together.
        scope: `"model"` ranks all units together; `"module"` ranks every depth-2 module by itself,
            so that each gives the same share.
        normalize: what scores are ranked as. `"zscore"`: (x - mean) / standard deviation, per
            module and attribute, ddof 0, and 0 where all are equal; `"none"`: as measured;
            `"rank"`: position / (n - 1) in ascending order, per module and attribute, equal scores
            in order of their index, and 0 for a single unit.

    Raises:
        ValueError: for shares outside [0, 1] or above 1 together; scores that are NaN or infinite;
            attributions of different modules, models, weights, metrics or token selections; or of
            the same data, where no unit matters more for one than for the other.
        TypeError: a share is no number; or scores are neither two attributions nor two mappings.

    Source: Li & Kim, arXiv 2410.10862.
    """
    given = {"scu": scu, "ucu": ucu, "ru": ru}
    shares = {group: fraction_of(group, share) for group, share in given.items()}
    if math.fsum(shares.values()) > 1.0 + SLACK:
        raise ValueError(
            f"scu + ucu + ru is {scu} + {ucu} + {ru} = {math.fsum(shares.values()):.6g}; "
            "together they must be at most 1"
        )
    check_choice("scope", scope, SCOPES)
    check_choice("normalize", normalize, NORMALIZATIONS)
    metadata = None  # plain mappings do not say where they come from
    if not (isinstance(safety, Mapping) and isinstance(utility, Mapping)):
        if not (isinstance(safety, Attribution) and isinstance(utility, Attribution)):
            raise TypeError(
                f"safety is {type(safety).__name__} and utility is {type(utility).__name__}; both "
                "must be Attribution, or both mappings of module name to scores"
            )
        metadata = _shared_metadata(safety, utility)
        safety, utility = safety.scores, utility.scores
    safety, utility = checked_scores("safety", safety), checked_scores("utility", utility)
    sizes = sizes_of(safety)
    check_same_modules("safety", sizes, "utility", sizes_of(utility))

    ranked = normalized(safety, normalize), normalized(utility, normalize)
    indices: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for names in blocks(list(sizes), scope):
        # All units that are ranked together in one row, [n].
        s, u = (torch.cat([scores[name] for name in names]) for scores in ranked)
        total, difference = s + u, s - u
        n = len(total)
        left = torch.arange(n)  # sorted, so that ties go to the lower index
        for group, key in (("ru", total), ("scu", -difference), ("ucu", difference)):
            chosen = lowest(key, left, share_count(shares[group], n))
            left = without(left, chosen, n)
            indices[group] |= split(chosen, names, sizes)
        indices["cu"] |= split(left, names, sizes)
    groups = UnitGroups(
        {group: UnitSet(indices[group], sizes) for group in GROUPS},
        safety=safety,
        utility=utility,
        shares=shares,
        scope=scope,
        normalize=normalize,
        metadata=metadata,
    )
    groups._ranked = ranked  # `top` ranks by the same
    return groups


def _shared_metadata(safety: Attribution, utility: Attribution) -> dict[str, Any]:
    """Where both attributions come from; refuses two that cannot be compared."""
    for field, meaning in (
        ("metric", "metric"),
        ("tokens", "token selection"),
        ("model_name", "model"),
        ("units_hash", "units of the model"),
        ("all_experts", "routing to experts"),
    ):
        a, b = getattr(safety, field), getattr(utility, field)
        if a != b:
            raise ValueError(
                f"safety and utility differ in {meaning}: {field} is {a!r} in safety and {b!r} in "
                "utility; both must be measured in the same way on the same model"
            )
    # Names and units of a model before and after training are the same: its weights are not.
    check_same_weights(
        safety.weights_hash,
        utility.weights_hash,
        "safety and utility",
        "score both sets on the same model (classify(safety.scores, utility.scores, ...) compares "
        "them all the same)",
    )
    # Then every difference would be 0, and SCU and UCU the first units of the model.
    if safety.data_fingerprint == utility.data_fingerprint:
        raise ValueError(
            "safety and utility were measured on the same data (fingerprint "
            f"{safety.data_fingerprint[:12]}); they must be of two sets, harmful requests with "
            "refusals and ordinary instructions with answers"
        )
    return {
        "metric": safety.metric,
        "tokens": safety.tokens,
        "model_name": safety.model_name,
        "units_hash": safety.units_hash,
        "weights_hash": safety.weights_hash or utility.weights_hash,
        "data_fingerprint": {
            "safety": safety.data_fingerprint,
            "utility": utility.data_fingerprint,
        },
    }
