"""``UnitGroups``: the four groups of units of a model, with the scores that they were made of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssah.choices import By, Normalize, Scope, check_choice
from ssah.groups.checks import (
    GROUPS,
    NORMALIZATIONS,
    ORDERS,
    SCOPES,
    SLACK,
    Checked,
    check_same_modules,
    checked_scores,
    fraction_of,
    labels_of,
    sizes_of,
)
from ssah.groups.tables import group_counts, group_frame, upload_groups
from ssah.storage import FORMAT, TEXT, Fields, Stored, check_fields, hub_folder, save_tensors
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
)
from ssah.version import __version__

if TYPE_CHECKING:
    from pandas import DataFrame

# By what a group is taken, and whether its units are the highest (1) or the lowest (-1).
_OWN: dict[str, tuple[str, int]] = {
    "scu": ("difference", 1),
    "ucu": ("difference", -1),
    "ru": ("sum", -1),
    "cu": ("safety", 1),
}
_CONTENT = "ssah unit groups"
_METADATA: Fields = {
    "metric": TEXT,
    "tokens": TEXT,
    "model_name": TEXT,
    "units_hash": TEXT,
    "weights_hash": TEXT,
    "data_fingerprint": (dict, type(None)),
}
_NO_METADATA = dict.fromkeys(_METADATA)  # of plain mappings of scores, and of older results
_FIELDS: Fields = {
    "modules": list,
    "groups": list,
    "shares": dict,
    "scope": str,
    "normalize": str,
    **_METADATA,
}


class UnitGroups(Mapping[str, UnitSet]):
    """The four groups of units of a model: `"scu"`, `"ucu"`, `"ru"` and `"cu"`, each a `UnitSet`.

    Groups are disjoint, and together they hold every unit of the scope. Made by `classify`, after
    Li & Kim, arXiv 2410.10862: safety- and utility-critical, redundant and complex units.

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
        """Raises ValueError where groups overlap, leave a unit out or differ from the scores.

        ``safety``, ``utility``: B's name to numbers [n_units].
        """
        check_choice("scope", scope, SCOPES)
        check_choice("normalize", normalize, NORMALIZATIONS)
        if sorted(groups) != sorted(GROUPS):
            raise ValueError(f"groups are named {sorted(groups)}; they must be {list(GROUPS)}")
        self.safety: Mapping[str, Tensor] = checked_scores("safety", safety)
        self.utility: Mapping[str, Tensor] = checked_scores("utility", utility)
        self.sizes = sizes_of(self.safety)
        check_same_modules("safety", self.sizes, "utility", sizes_of(self.utility))
        # In the order of safety, so that a row of all units means the same units in both.
        self.utility = Checked({name: self.utility[name] for name in self.sizes})
        self.shares = dict(shares)
        self.scope = scope
        self.normalize = normalize
        self.metadata = _NO_METADATA | dict(metadata or {})
        self._groups = {group: groups[group] for group in GROUPS}
        for group, units in self._groups.items():
            check_same_modules("safety", self.sizes, f"group {group}", units.sizes)
        self._labels = labels_of(self._groups, self.sizes)

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
        check_choice("group", group, GROUPS)
        check_choice("by", by, ORDERS)
        fraction = fraction_of("fraction", fraction)
        # What was asked for, not what rounding made of it: a share that was given may be taken.
        share = self.shares[group] if group != "cu" else 1.0 - math.fsum(self.shares.values())
        if fraction > share + SLACK:
            raise ValueError(
                f"fraction is {fraction}; the group {group} is {share:.6g} of all units, so that "
                "fraction must be at most that (it counts units of the scope, not of the group)"
            )
        # `lowest` is what classify chose by, so that ties fall as they fell there.
        order, sign = _OWN[group] if by == "group" else (by, 1)
        indices: dict[str, Tensor] = {}
        for names in blocks(list(self.sizes), self.scope):
            key = sign * order_key(*self._ranked, names, order)  # [units] that rank together
            labels = torch.cat([self._labels[name] for name in names])  # [units]
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
        return group_counts(self._labels)

    def to_frame(self) -> DataFrame:
        """A pandas table, a row a unit: module, layer, kind, unit, group, safety, utility."""
        return group_frame(self._labels, self.safety, self.utility)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write groups, scores and metadata to a directory: safetensors and JSON, no pickle.

        Tensors are `group/<module>` (uint8 [n_units], see `labels`), `safety/<module>` and
        `utility/<module>` (float64 [n_units]); the rest is in the JSON.
        """
        save_tensors(directory, self._tensors(), self._meta())

    def push_to_hub(
        self, repo_id: str, *, figures: Mapping[str, Any] | None = None, **options: Any
    ) -> str:
        """Upload what :meth:`save` writes, with a card and without a local path, for :meth:`load`.

        Args:
            repo_id, options: as of `ssah.storage.upload`, which returns the commit's address.
            figures: for the card, what was measured: name -> what `ssah.evaluation.rate` gives.

        Raises:
            ValueError: a figure has no interval; it is named.
        """
        about = (self._tensors(), self._meta(), self.summary(), figures)
        return upload_groups(repo_id, *about, **options)

    def _tensors(self) -> dict[str, Tensor]:
        kinds = {"group": self._labels, "safety": self.safety, "utility": self.utility}
        return {f"{kind}/{name}": x for kind, of in kinds.items() for name, x in of.items()}

    def _meta(self) -> dict[str, Any]:
        return {
            "content": _CONTENT,
            "format": FORMAT,
            "version": __version__,
            "groups": list(GROUPS),
            "modules": list(self.sizes),
            "shares": self.shares,
            "scope": self.scope,
            "normalize": self.normalize,
            **self.metadata,
        }

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module | None = None) -> UnitGroups:
        """Read what `save` wrote.

        Args:
            directory: where `save` wrote to, or ``"hf:user/name"``.
            model: the model that the groups are meant for.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the directory holds something else, is damaged (the file and the field are
                named), or `model` has other units (where scores came from plain mappings: other
                modules or numbers of units).
        """
        stored = Stored(hub_folder(directory), _CONTENT, _FIELDS, _NO_METADATA)
        stored.choice("scope", SCOPES)
        stored.choice("normalize", NORMALIZATIONS)
        meta, names = stored.meta, stored.names("modules")  # a file of tensors keeps no order
        if sorted(stored.names("groups")) != sorted(GROUPS):
            raise stored.damaged(f"the field 'groups' must have {', '.join(GROUPS)}")
        check_fields(stored.path, meta["shares"], {"scu": float, "ucu": float, "ru": float})
        safety = {name: stored.tensor(f"safety/{name}") for name in names}
        sizes = sizes_of(safety)
        utility = {name: stored.tensor(f"utility/{name}", shape=(n,)) for name, n in sizes.items()}
        labels = {
            name: stored.tensor(f"group/{name}", dtype=torch.uint8, shape=(n,))
            for name, n in sizes.items()
        }
        # Labels are positions in the file's list of groups, whatever its order.
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
                metadata={key: meta[key] for key in _METADATA},
            )
        except ValueError as error:  # a label that is no group's: its unit is in none
            raise stored.damaged(str(error)) from error
        if model is not None:
            # Groups of plain scores have no hash of the units: compare names and sizes too.
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
        counts = ", ".join(f"{g}={len(own)} ({len(own) / total:.2%})" for g, own in self.items())
        return (
            f"UnitGroups({counts}; {total} units in {len(self.sizes)} modules, "
            f"scope={self.scope!r}, normalize={self.normalize!r}, "
            f"model={self.metadata['model_name']!r})"
        )
