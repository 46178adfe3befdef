"""Which units a model has: families of architectures, depth-2 modules, and sets of units."""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.units.attention import AttentionHeads
from ssah.units.bit_mask import BitMask
from ssah.units.depth_two import KINDS, DepthTwoModule, GatedFFN, UnitSlice, act_name
from ssah.units.experts import DOWN, RoutedExperts, up_name
from ssah.units.families import FAMILIES, gguf_architecture, register_family
from ssah.units.family import FFN, Attention, Experts, Family, NotCovered
from ssah.units.find import (
    check_units,
    family_of,
    family_of_config,
    find_heads,
    find_modules,
    find_not_covered,
    layer_names,
    layers_path,
)
from ssah.units.frames import unit_frame
from ssah.units.identity import check_same_model, config_hash, model_name, units_hash
from ssah.units.places import layer_of
from ssah.units.projections import (
    check_parameters,
    check_unsplit,
    features,
    is_computed,
    projection,
)
from ssah.units.ranking import blocks, lowest, normalized, order_key, share_count, split, without
from ssah.units.routing import Routing, product_dtype
from ssah.units.unit_set import UnitSet

__all__ = [
    "FFN",
    "KINDS",
    "Attention",
    "AttentionHeads",
    "BitMask",
    "DepthTwoModule",
    "Experts",
    "Family",
    "GatedFFN",
    "NotCovered",
    "UnitSet",
    "UnitSlice",
    "check_units",
    "family_of",
    "family_of_config",
    "find_heads",
    "find_modules",
    "find_not_covered",
    "layer_names",
    "layers_path",
    "register_family",
]

__getattr__ = submodules_of(__name__)
