"""Names of parameters and numbers of rows, layers and heads, as users give them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

_STRETCH = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_MOST = 10_000_000  # rows of one parameter: no vocabulary has as many, and a slip of the keys may


def matching_parameters(model: nn.Module, patterns: Collection[str], argument: str) -> set[str]:
    """Names as ``model.named_parameters()`` gives them: of tied parameters, the first.

    Args:
        model: the model.
        patterns: names of parameters, or patterns of them as :mod:`fnmatch` reads them.
        argument: the name of that argument, for the message.

    Raises:
        TypeError: ``patterns`` is no collection of names.
        ValueError: the model lacks one; it is named.
    """
    if isinstance(patterns, str | Mapping) or not isinstance(patterns, Collection):
        kind = {str: "string", dict: "mapping"}.get(type(patterns), type(patterns).__name__)
        raise TypeError(
            f"{argument} is a {kind}, must be a collection of parameter names, or patterns such as "
            "'*norm*': it is for whole parameters; some of their rows are for rows="
        )
    # Tied parameters have several names: what is chosen is one, the first.
    first = {id(p): name for name, p in model.named_parameters()}
    every = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    found: set[str] = set()
    unknown: list[str] = []
    for pattern in patterns:
        own = {canonical for name, canonical in every.items() if fnmatchcase(name, pattern)}
        found |= own
        if not own:  # a slip of the pen would keep nothing, and say nothing
            unknown.append(pattern)
    if unknown:
        raise ValueError(
            f"{argument} has names that the model lacks: {', '.join(unknown)}; they "
            "must be from model.named_parameters(), or patterns of them such as '*norm*'"
        )
    return found


def row_numbers(name: str, numbers: Sequence[int] | Tensor, n_rows: int) -> Tensor:
    """``numbers`` of rows of ``name`` as int64 ``[rows]`` on the CPU, ascending and each once.

    Raises:
        TypeError: they are a mask, or no list.
        ValueError: there is none, or one that is no whole number below ``n_rows``.
    """
    if isinstance(numbers, Tensor) and numbers.dtype is torch.bool:
        raise TypeError(f"rows has a mask for {name!r}, must be row numbers: mask.nonzero()[:, 0]")
    if isinstance(numbers, Tensor):
        numbers = numbers.tolist()
    if isinstance(numbers, str) or not isinstance(numbers, Collection):
        raise TypeError(f"rows has {numbers!r} for {name!r}, must be a list of row numbers")
    wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int)]
    wrong = wrong or [n for n in numbers if not 0 <= n < n_rows]
    if wrong or not len(numbers):
        raise ValueError(
            f"rows has {wrong[0] if wrong else 'no row'!r} for {name!r}, must have whole numbers "
            f"from 0 to {n_rows - 1}; tokens that are added come first "
            "(model.resize_token_embeddings), then the plan"
        )
    return torch.tensor(sorted(set(numbers)), dtype=torch.int64)


def numbers_of(text: str, whole: str) -> list[int] | None:
    """The numbers that a text names, ascending, each once: ``"3,5-7"`` gives 3, 5, 6 and 7.

    Args:
        text: numbers and stretches, whose both ends are in them.
        whole: what the message begins with, e.g. ``"rows of lm_head.weight"``.

    Returns:
        None where the text has another form.

    Raises:
        ValueError: the first number of a stretch is behind the last, or the last is too large.
    """
    found: set[int] = set()
    for part in text.split(","):
        stretch = _STRETCH.fullmatch(part.strip())
        if stretch is None:
            return None
        first, last = int(stretch[1]), int(stretch[2] or stretch[1])
        if not first <= last < _MOST:
            raise ValueError(
                f"{whole} has {part.strip()!r}; the first must not be behind the last, and the "
                f"last below {_MOST:,}"
            )
        found.update(range(first, last + 1))
    return sorted(found)
