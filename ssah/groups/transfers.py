"""Attribute transfer: which units change their group when a model is trained.

Example: of four units, one went from RU to CU and three stayed SCU. Then the matrix has 0.25 at
(ru, cu) and 0.75 at (scu, scu): fractions of all units, not of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssah.groups.unit_groups import UnitGroups


@dataclass(frozen=True)
class Transfer:
    """How units moved between groups: Li & Kim, arXiv 2410.10862, attribute transfer.

    Attributes:
        groups: names of rows and columns, `("scu", "ucu", "ru", "cu")`.
        matrix: float64 [4, 4]; entry (i, j) is the fraction of *all* units that were in groups[i]
            before and are in groups[j] after. It sums to 1; row sums are the groups before, column
            sums the groups after.
    """

    groups: tuple[str, ...]
    matrix: Tensor

    def __str__(self) -> str:
        lines = ["before \\ after" + "".join(f"{group:>9}" for group in self.groups)]
        for group, row in zip(self.groups, self.matrix.tolist(), strict=True):
            lines.append(f"{group:>14}" + "".join(f"{share:>9.2%}" for share in row))
        return "\n".join(lines)


def transfer(groups_before: UnitGroups, groups_after: UnitGroups) -> Transfer:
    """The fraction of all units that went from each group to each group.

    Args:
        groups_before, groups_after: groups of the same units, for instance of a model before and
            after fine-tuning, made by `classify` with the same `scope`.

    Raises:
        TypeError: either is something else.
        ValueError: where the two cover different modules or numbers of units, or were ranked with
            a different `scope`.

    Source: Li & Kim, arXiv 2410.10862 (attribute transfer).
    """
    for name, groups in (("groups_before", groups_before), ("groups_after", groups_after)):
        if not isinstance(groups, UnitGroups):
            raise TypeError(f"{name} is {type(groups).__name__}; it must be UnitGroups")
    if groups_before.scope != groups_after.scope:
        raise ValueError(
            f"groups_before has scope {groups_before.scope!r} and groups_after has scope "
            f"{groups_after.scope!r}; both must be ranked in the same scope"
        )
    if groups_before.sizes != groups_after.sizes:
        differing = sorted(groups_before.sizes.items() ^ groups_after.sizes.items())
        name = differing[0][0]
        raise ValueError(
            f"groups_before and groups_after cover different units: {name} has "
            f"{groups_before.sizes.get(name, 'no')} units before and "
            f"{groups_after.sizes.get(name, 'no')} after; both must be of the same modules"
        )
    names = tuple(groups_before)  # in the order of the labels
    side = len(names)
    before, after = (  # [units] each, positions in names
        torch.cat([groups.labels(name) for name in groups_before.sizes]).long()
        for groups in (groups_before, groups_after)
    )
    # A unit that went from group i to group j counts at i * side + j.
    counts = torch.bincount(before * side + after, minlength=side * side)
    matrix = counts.double().view(side, side) / counts.sum()
    return Transfer(groups=names, matrix=matrix)
