"""What a method touches: units, heads, layers, parameters, rows or single weights of a model."""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.selections.making import (
    heads,
    layers,
    of_parameters,
    of_rows,
    parameters,
    rows,
    units,
    weights,
)
from ssah.selections.masks import narrowed
from ssah.selections.naming import matching_parameters, numbers_of, row_numbers
from ssah.selections.outline import Outline
from ssah.selections.outputs import output_parts
from ssah.selections.selection import Selection, of_units
from ssah.selections.selectors import (
    check_named,
    is_selector,
    named,
    names_groups,
    select,
    select_units,
)

__all__ = [
    "Selection",
    "heads",
    "layers",
    "parameters",
    "rows",
    "select",
    "units",
    "weights",
]

__getattr__ = submodules_of(__name__)
