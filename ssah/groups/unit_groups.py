"""Sorting units into safety-critical, utility-critical, redundant and complex ones.

`classify` ranks units by two attributions, one measured on a safety set (I_S) and one on a utility
set (I_U). Redundant units are chosen first, then safety-critical, then utility-critical ones, each
from what is left; the rest is complex (Li & Kim, arXiv 2410.10862, section 4).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ssah.groups.checks import Checked, check_same_modules, checked_scores, choice, fraction_of
from ssah.models import check_same_weights
from ssah.storage import FORMAT, TEXT, Fields, Stored, check_fields, save_tensors
from ssah.units import (
    UnitSet,
    blocks,
    check_same_model,
    check_units,
    lowest,
    normalized,
    order_key,
    share_count,
    split,
    without,
)
from ssah.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from ssah.attribution import Attribution

GROUPS = ("scu", "ucu", "ru", "cu")
SCOPES = ("module", "model")
NORMALIZATIONS = ("none", "zscore", "rank")
ORDERS = ("safety", "utility", "difference", "sum", "group")
# By what a group is taken, and whether its units are the highest (1) or the lowest (-1).
_OWN: dict[str, tuple[str, int]] = {
    "scu": ("difference", 1),
    "ucu": ("difference", -1),
    "ru": ("sum", -1),
    "cu": ("safety", 1),
}
METADATA = ("metric", "tokens", "model_name", "units_hash", "weights_hash", "data_fingerprint")

_CONTENT = "ssah unit groups"
_FIELDS: Fields = {
    "modules": list,
    "groups": list,
    "shares": dict,
    "scope": str,
    "normalize": str,
    "metric": TEXT,
    "tokens": TEXT,
    "model_name": TEXT,
    "units_hash": TEXT,
    "weights_hash": TEXT,
    "data_fingerprint": (dict, type(None)),
}
_SLACK = 1e-9  # shares such as 0.7 + 0.2 + 0.1 are not exact in binary

Scope = Literal["module", "model"]
Normalize = Literal["none", "zscore", "rank"]
By = Literal["safety", "utility", "difference", "sum", "group"]


# ---------------------------------------------------------------------------------- validation


def _scores(attribution: Attribution | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return attribution if isinstance(attribution, Mapping) else attribution.scores


def _shared_metadata(
    safety: Attribution | Mapping[str, Tensor], utility: Attribution | Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """Where both attributions come from; refuses two that cannot be compared."""
    if isinstance(safety, Mapping) and isinstance(utility, Mapping):
        return None
    kinds = [type(each).__name__ for each in (safety, utility)]
    if kinds != ["Attribution", "Attribution"]:
        raise TypeError(
            f"safety is {kinds[0]} and utility is {kinds[1]}; both must be Attribution, or both "
            "mappings of module name to scores"
        )
    assert not isinstance(safety, Mapping)
    assert not isinstance(utility, Mapping)
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
    check_same_weights(
        safety.weights_hash,
        utility.weights_hash,
        "safety and utility",
        "score both sets on the same model (classify(safety.scores, utility.scores, ...) compares "
        "them all the same)",
    )
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


# --------------------------------------------------------------------------------- unit groups


class UnitGroups(Mapping[str, UnitSet]):
    """The four groups of units of a model: `"scu"`, `"ucu"`, `"ru"` and `"cu"`, each a `UnitSet`.

    Groups are disjoint, and together they hold every unit of the scope. Made by `classify`.

    Attributes:
        safety, utility: the scores I_S and I_U that were ranked, as measured: B's name to float64
            [n_units] on the CPU, in model order.
        shares: what was asked for, `{"scu": ..., "ucu": ..., "ru": ...}`, fractions of all units.
        scope: `"module"` or `"model"`, what was ranked together.
        normalize: `"none"`, `"zscore"` or `"rank"`.
        metadata: where the scores come from: `metric`, `tokens`, `model_name`, `units_hash`,
            `weights_hash` and `data_fingerprint` (one each for safety and utility); values are None
            where plain mappings of scores were classified.
    """

    def __init__(
        self,
        groups: Mapping[str, UnitSet],
        *,
        safety: Mapping[str, Tensor],
        utility: Mapping[str, Tensor],
        shares: Mapping[str, float],
        scope: Scope = "model",
        normalize: Normalize = "zscore",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ValueError where groups overlap, leave a unit out or differ from the scores."""
        choice("scope", scope, SCOPES)
        choice("normalize", normalize, NORMALIZATIONS)
        if sorted(groups) != sorted(GROUPS):
            raise ValueError(f"groups are named {sorted(groups)}; they must be {list(GROUPS)}")
        self.safety: Mapping[str, Tensor] = checked_scores("safety", safety)
        self.utility: Mapping[str, Tensor] = checked_scores("utility", utility)
        self.sizes = {name: len(x) for name, x in self.safety.items()}
        check_same_modules(
            "safety", self.sizes, "utility", {name: len(x) for name, x in self.utility.items()}
        )
        self.utility = Checked({name: self.utility[name] for name in self.sizes})
        self.shares = dict(shares)
        self.scope = scope
        self.normalize = normalize
        self.metadata = dict.fromkeys(METADATA) | dict(metadata or {})
        self._groups = {group: groups[group] for group in GROUPS}
        for group, units in self._groups.items():
            check_same_modules("safety", self.sizes, f"group {group}", units.sizes)
        self._labels = self._check_partition()

    def _check_partition(self) -> dict[str, Tensor]:
        """The group of every unit: B's name to uint8 [n_units], positions in GROUPS."""
        masks = [self._groups[group].over(self.sizes) for group in GROUPS]
        times = torch.zeros(sum(self.sizes.values()), dtype=torch.uint8)
        labels = torch.zeros_like(times)
        for number, mask in enumerate(masks):
            times += mask
            labels[mask] = number
        wrong = (times != 1).nonzero()[:, 0]
        if len(wrong):
            ((name, own),) = (
                (name, index)
                for name, index in split(wrong[:1], [*self.sizes], self.sizes).items()
                if len(index)
            )
            raise ValueError(
                f"unit {int(own[0])} of {name} is in {int(times[wrong[0]])} groups; "
                f"each of its {self.sizes[name]} units must be in exactly one"
            )
        return dict(zip(self.sizes, labels.split([*self.sizes.values()]), strict=True))

    def __getitem__(self, group: str) -> UnitSet:
        return self._groups[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def labels(self, name: str) -> Tensor:
        """The group of each unit of module `name`: uint8 [n_units], 0 scu, 1 ucu, 2 ru, 3 cu."""
        return self._labels[name]

    @cached_property
    def _ranked(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return normalized(self.safety, self.normalize), normalized(self.utility, self.normalize)

    def top(self, group: str, fraction: float, by: By = "safety") -> UnitSet:
        """The units of a group that rank highest, in the scope and normalisation of the groups.

        Args:
            group: `"scu"`, `"ucu"`, `"ru"` or `"cu"`.
            fraction: how many units, as a fraction in [0, 1] of *all* units of the scope, not of
                the group: floor(fraction * n + 0.5) of every module's n units for
                `scope="module"`, of all units together for `scope="model"`. It can be at most the
                group's own share. Where rounding left the group a unit short, all of it is taken.
            by: rank by `"safety"` (I_S), `"utility"` (I_U), `"difference"` (I_S - I_U), `"sum"`
                (I_S + I_U), or by what makes the `"group"`, so that the units are those that
                `classify` would have taken first: of SCU the highest I_S - I_U, of UCU the lowest,
                of RU the lowest I_S + I_U; of CU, which are what is left, the highest I_S. Ties go
                to the lower index.

        Raises:
            ValueError: for an unknown group or order, or a fraction above the group's share.
        """
        choice("group", group, GROUPS)
        choice("by", by, ORDERS)
        fraction = fraction_of("fraction", fraction)
        share = self.shares[group] if group != "cu" else 1.0 - math.fsum(self.shares.values())
        if fraction > share + _SLACK:
            raise ValueError(
                f"fraction is {fraction}; the group {group} is {share:.6g} of all units, so that "
                "fraction must be at most that (it counts units of the scope, not of the group)"
            )
        order, sign = _OWN[group] if by == "group" else (by, 1)
        indices: dict[str, Tensor] = {}
        for names in blocks(list(self.sizes), self.scope):
            key = sign * order_key(*self._ranked, names, order)
            labels = torch.cat([self._labels[name] for name in names])
            candidates = (labels == GROUPS.index(group)).nonzero().flatten()
            chosen = lowest(-key, candidates, share_count(fraction, len(key)))
            indices |= split(chosen, names, self.sizes)
        return UnitSet(indices, self.sizes)

    def summary(self) -> dict[str, Any]:
        """Counts as plain data, for tables and JSON.

        Returns a dict with `units` (all of the scope), `groups` (per group `units` and the
        `fraction` of all), `modules` (one dict per module in model order: `module`, `layer`,
        `units`, and one count per group) and `layers` (the same, summed over each layer). A
        layer is the first number in a module's name, or None where there is none.
        """
        modules = []
        for name, labels in self._labels.items():
            counts = torch.bincount(labels, minlength=len(GROUPS)).tolist()
            row: dict[str, Any] = {"module": name, "layer": _layer(name), "units": len(labels)}
            modules.append(row | dict(zip(GROUPS, counts, strict=True)))
        layers: dict[int | None, dict[str, Any]] = {}
        for row in modules:
            layer = layers.setdefault(
                row["layer"], {"layer": row["layer"]} | dict.fromkeys(("units", *GROUPS), 0)
            )
            for column in ("units", *GROUPS):
                layer[column] += row[column]
        total = sum(self.sizes.values())
        return {
            "units": total,
            "groups": {
                group: {"units": len(units), "fraction": len(units) / total}
                for group, units in self.items()
            },
            "modules": modules,
            "layers": list(layers.values()),
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write groups, scores and metadata to a directory: safetensors and JSON, no pickle.

        Tensors are `group/<module>` (uint8 [n_units], see `labels`), `safety/<module>` and
        `utility/<module>` (float64 [n_units]); the rest is in the JSON.
        """
        tensors: dict[str, Tensor] = {}
        for name in self.sizes:
            tensors[f"group/{name}"] = self._labels[name]
            tensors[f"safety/{name}"] = self.safety[name]
            tensors[f"utility/{name}"] = self.utility[name]
        meta = {
            "content": _CONTENT,
            "format": FORMAT,
            "version": __version__,
            "groups": list(GROUPS),
            "modules": list(self.sizes),
            "shares": self.shares,
            "scope": self.scope,
            "normalize": self.normalize,
        }
        save_tensors(directory, tensors, meta | self.metadata)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module | None = None) -> UnitGroups:
        """Read what `save` wrote.

        Args:
            directory: where `save` wrote to.
            model: the model that the groups are meant for.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the directory holds something else, is damaged (the file and the field are
                named), or `model` has other units (where scores came from plain mappings: other
                modules or numbers of units).
        """
        stored = Stored(directory, _CONTENT, _FIELDS, dict.fromkeys(METADATA))
        stored.choice("scope", SCOPES)
        stored.choice("normalize", NORMALIZATIONS)
        meta, names = stored.meta, stored.names("modules")
        if sorted(stored.names("groups")) != sorted(GROUPS):
            raise stored.damaged(f"the field 'groups' must have {', '.join(GROUPS)}")
        check_fields(stored.path, meta["shares"], {"scu": float, "ucu": float, "ru": float})
        safety = {name: stored.tensor(f"safety/{name}") for name in names}
        sizes = {name: len(x) for name, x in safety.items()}
        utility = {name: stored.tensor(f"utility/{name}", shape=(n,)) for name, n in sizes.items()}
        labels = {
            name: stored.tensor(f"group/{name}", dtype=torch.uint8, shape=(n,))
            for name, n in sizes.items()
        }
        members = {
            group: {name: (x == i).nonzero().flatten() for name, x in labels.items()}
            for i, group in enumerate(meta["groups"])
        }
        try:
            groups = cls(
                {group: UnitSet(indices, sizes) for group, indices in members.items()},
                safety=safety,
                utility=utility,
                shares=meta["shares"],
                scope=meta["scope"],
                normalize=meta["normalize"],
                metadata={key: meta[key] for key in METADATA},
            )
        except ValueError as error:  # a unit in no group
            raise stored.damaged(str(error)) from error
        if model is not None:
            check_same_model(
                model,
                groups.metadata["units_hash"],
                expected_name=str(groups.metadata["model_name"]),
                what="unit groups",
            )
            check_units(model, groups["cu"])
        return groups

    def __repr__(self) -> str:
        total = sum(self.sizes.values())
        counts = ", ".join(
            f"{group}={len(units)} ({len(units) / total:.2%})" for group, units in self.items()
        )
        return (
            f"UnitGroups({counts}; {total} units in {len(self.sizes)} modules, "
            f"scope={self.scope!r}, normalize={self.normalize!r}, "
            f"model={self.metadata['model_name']!r})"
        )


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


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

    Source: Li & Kim, arXiv 2410.10862.
    """
    shares = {
        "scu": fraction_of("scu", scu),
        "ucu": fraction_of("ucu", ucu),
        "ru": fraction_of("ru", ru),
    }
    if math.fsum(shares.values()) > 1.0 + _SLACK:
        raise ValueError(
            f"scu + ucu + ru is {scu} + {ucu} + {ru} = {math.fsum(shares.values()):.6g}; "
            "together they must be at most 1"
        )
    choice("scope", scope, SCOPES)
    choice("normalize", normalize, NORMALIZATIONS)
    metadata = _shared_metadata(safety, utility)
    safety_scores = checked_scores("safety", _scores(safety))
    utility_scores = checked_scores("utility", _scores(utility))
    sizes = {name: len(x) for name, x in safety_scores.items()}
    check_same_modules(
        "safety", sizes, "utility", {name: len(x) for name, x in utility_scores.items()}
    )

    ranked = normalized(safety_scores, normalize), normalized(utility_scores, normalize)
    indices: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for names in blocks(list(sizes), scope):
        s, u = (torch.cat([scores[name] for name in names]) for scores in ranked)
        total, difference = s + u, s - u
        n = len(total)
        left = torch.arange(n)
        for group, key in (("ru", total), ("scu", -difference), ("ucu", difference)):
            chosen = lowest(key, left, share_count(shares[group], n))
            left = without(left, chosen, n)
            indices[group] |= split(chosen, names, sizes)
        indices["cu"] |= split(left, names, sizes)
    groups = UnitGroups(
        {group: UnitSet(indices[group], sizes) for group in GROUPS},
        safety=safety_scores,
        utility=utility_scores,
        shares=shares,
        scope=scope,
        normalize=normalize,
        metadata=metadata,
    )
    groups._ranked = ranked  # `top` ranks by the same
    return groups
