"""What one can choose between, as types: the commands offer these without importing torch.

Example: ``Scope`` is ``Literal["module", "model"]``, and ``get_args(Scope)`` its names.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = [
    "Counted",
    "Dtype",
    "Group",
    "Kind",
    "Metric",
    "Normalize",
    "Overlong",
    "Scope",
    "Tokens",
]

Metric: TypeAlias = Literal["variance", "norm", "taylor", "fisher"]
Tokens: TypeAlias = Literal["auto", "all", "after_first", "labels"]  # which of them count
Kind: TypeAlias = Literal["mlp", "attention"]
Group: TypeAlias = Literal["scu", "ucu", "ru", "cu"]
Scope: TypeAlias = Literal["module", "model"]  # what is ranked together: one depth-2 module, or all
Normalize: TypeAlias = Literal["none", "zscore", "rank"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Overlong: TypeAlias = Literal["cut", "skip", "error"]  # what becomes of a row that is too long
# Of the studies, which score rows with answers: the response, or every token.
Counted: TypeAlias = Literal["labels", "all"]
