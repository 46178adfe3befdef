"""Units as a table: one row for each, with the place of its module in the model.

Example: the units 1 and 4 of one module, with a score each:

    module                     layer  kind  unit  score
    model.layers.0.mlp.down_proj   0  mlp      1    0.5
    model.layers.0.mlp.down_proj   0  mlp      4    2.0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssah.units.places import kind_of, layer_of

if TYPE_CHECKING:
    from pandas import DataFrame


def unit_frame(
    indices: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Tensor]] | None = None
) -> DataFrame:
    """A table with the columns ``module``, ``layer``, ``kind`` and ``unit``, and those of values.

    Args:
        indices: B's name -> int64 ``[n]``, the units of that module.
        values: column -> B's name -> ``[n]``, what the column has of these units.

    Returns:
        a frame of pandas, which comes with ``datasets``. Where a name has no number of a layer, or
        is that of no known architecture, its layer or kind is missing.
    """
    import pandas

    counts = [len(index) for index in indices.values()]

    def repeated(column: list[str | int | None], dtype: str) -> pandas.Series:
        return pandas.Series(column, dtype=dtype).repeat(counts).reset_index(drop=True)

    names = list(indices)
    frame = pandas.DataFrame(
        {
            "module": repeated(list(names), "str"),
            "layer": repeated([layer_of(name) for name in names], "Int64"),  # it may be missing
            "kind": repeated([kind_of(name) for name in names], "str"),
            "unit": _joined(indices).numpy(),
        }
    )
    for column, of_modules in (values or {}).items():
        frame[column] = _joined({name: of_modules[name] for name in names}).numpy()
    return frame


def _joined(parts: Mapping[str, Tensor]) -> Tensor:
    """Of all modules, one after the other: ``[units]``."""
    return torch.cat([*parts.values()]) if parts else torch.zeros(0, dtype=torch.int64)
