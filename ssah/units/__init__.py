"""Which units a model has: families of architectures, depth-2 modules, and sets of units."""

from __future__ import annotations

from ssah.units.experts import DOWN, RoutedExperts, run_routed, up_name
from ssah.units.families import (
    FAMILIES,
    FFN,
    Attention,
    Experts,
    Family,
    NotCovered,
    register_family,
)
from ssah.units.find import (
    KINDS,
    DepthTwoModule,
    GatedFFN,
    UnitSlice,
    act_name,
    check_units,
    family_of,
    family_of_config,
    find_modules,
    find_not_covered,
    layers_path,
)
from ssah.units.identity import check_same_model, config_hash, model_name, units_hash
from ssah.units.projections import check_parameters, is_computed
from ssah.units.ranking import blocks, lowest, normalized, order_key, share_count, split, without
from ssah.units.unit_set import UnitSet

__all__ = [
    "DOWN",
    "FAMILIES",
    "FFN",
    "KINDS",
    "Attention",
    "DepthTwoModule",
    "Experts",
    "Family",
    "GatedFFN",
    "NotCovered",
    "RoutedExperts",
    "UnitSet",
    "UnitSlice",
    "act_name",
    "blocks",
    "check_parameters",
    "check_same_model",
    "check_units",
    "config_hash",
    "family_of",
    "family_of_config",
    "find_modules",
    "find_not_covered",
    "is_computed",
    "layers_path",
    "lowest",
    "model_name",
    "normalized",
    "order_key",
    "register_family",
    "run_routed",
    "share_count",
    "split",
    "units_hash",
    "up_name",
    "without",
]
