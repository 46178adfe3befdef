"""What one can choose between, as types: the rooms check by these, and the commands offer them
without importing torch.

Example: ``Scope`` is ``Literal["module", "model"]``, and ``get_args(Scope)`` its names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

Metric: TypeAlias = Literal["variance", "norm", "taylor", "fisher"]
WeightMetric: TypeAlias = Literal["snip", "wanda", "magnitude", "fisher"]  # of single weights
Tokens: TypeAlias = Literal["auto", "all", "after_first", "labels"]  # which of them count
Kind: TypeAlias = Literal["mlp", "attention"]
Group: TypeAlias = Literal["scu", "ucu", "ru", "cu"]
Scope: TypeAlias = Literal["module", "model"]  # what is ranked together: one depth-2 module, or all
# Which weights are ranked together: those of one output, of one matrix, or all.
Per: TypeAlias = Literal["row", "matrix", "model"]
By: TypeAlias = Literal["safety", "utility", "difference", "sum", "group"]
Normalize: TypeAlias = Literal["none", "zscore", "rank"]
# When an entry that several heads or units share is selected: where all of these are, or any.
Shared: TypeAlias = Literal["all", "any"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
# How accelerate deals a model that is larger than one device to all that there are.
DeviceMap: TypeAlias = Literal["auto", "balanced", "balanced_low_0", "sequential", "cpu"]
Overlong: TypeAlias = Literal["cut", "skip", "error"]  # what becomes of a row that is too long
# Of the studies, which score rows with answers: the response, or every token.
Counted: TypeAlias = Literal["labels", "all"]

# Of deltas: how several become one, which elements of each are kept, and what is ranked together.
Combine: TypeAlias = Literal["sum", "mean", "ties"]
Kept: TypeAlias = Literal["magnitude", "random"]
KeptScope: TypeAlias = Literal["tensor", "model"]


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse, with ValueError, a value of the argument ``name`` that is not among the allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
