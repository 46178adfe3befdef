"""Units sorted into groups by their scores, and what becomes of the groups after training."""

from __future__ import annotations

from ssah.groups.checks import GROUPS, NORMALIZATIONS, ORDERS, SCOPES, share_of
from ssah.groups.classification import classify
from ssah.groups.transfers import Transfer, transfer
from ssah.groups.unit_groups import UnitGroups
from ssah.lazy import submodules_of

__all__ = [
    "Transfer",
    "UnitGroups",
    "classify",
    "transfer",
]

__getattr__ = submodules_of(__name__)
