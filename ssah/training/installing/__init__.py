"""What a plan changes in a model, and whether that is whole, and alike on every rank."""

from __future__ import annotations

from ssah.training.installing.alike import check_alike
from ssah.training.installing.following import await_sharding, follow
from ssah.training.installing.forward_check import FLATTENS
from ssah.training.installing.in_place import check_in_place, check_unmoved, listed
from ssah.training.installing.installed import Installed
from ssah.training.installing.original_values import OriginalValues, Reversible
from ssah.training.installing.sharded import check_sharded, trained_values, whole_digests

__all__ = [
    "FLATTENS",
    "Installed",
    "OriginalValues",
    "Reversible",
    "await_sharding",
    "check_alike",
    "check_in_place",
    "check_sharded",
    "check_unmoved",
    "follow",
    "listed",
    "trained_values",
    "whole_digests",
]
