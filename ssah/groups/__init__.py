"""Units sorted into groups by their scores, and what becomes of the groups after training."""

from __future__ import annotations

from ssah.groups.transfers import Transfer, transfer
from ssah.groups.unit_groups import GROUPS, NORMALIZATIONS, ORDERS, SCOPES, UnitGroups, classify

__all__ = [
    "GROUPS",
    "NORMALIZATIONS",
    "ORDERS",
    "SCOPES",
    "Transfer",
    "UnitGroups",
    "classify",
    "transfer",
]
