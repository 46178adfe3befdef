"""Units as pairs of a module and an index, as one has them in a table, a CSV file or a paper.

Example: ``[("model.layers.3.mlp.down_proj", 17), (3, 4)]`` are two units of the same module, the
second of which is given by the number of its layer.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from ssah.units.places import is_expert, kind_of, layer_of


def indices_of(pairs: Iterable[Any], modules: Collection[str], kind: str) -> dict[str, list[int]]:
    """B's name -> the indices that the pairs have of it, in their order.

    Args:
        pairs: of a module's name, or a layer's number, and the index of a unit.
        modules: the names of the scope.
        kind: of the module that a layer's number means, ``"mlp"`` or ``"attention"``.

    Raises:
        ValueError: a pair is none, its module is not in the scope, a layer has none or several of
            that kind, or an index is no whole number; its position is named.
    """
    in_layer: dict[int | None, list[str]] = defaultdict(list)
    for name in modules:
        if kind_of(name) == kind:
            in_layer[layer_of(name)].append(name)
    found: dict[str, list[int]] = defaultdict(list)
    for position, pair in enumerate(pairs):
        try:
            place, index = pair
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"pairs[{position}] is {pair!r}, must be a module's name or a layer's number, and "
                "an index"
            ) from error
        what = f"pairs[{position}] is ({place!r}, {index!r})"
        if isinstance(place, str):
            name = place
            if name not in modules:
                raise ValueError(f"{what}, whose module must be one of sizes: {_some(modules)}")
        else:
            name = _of_layer(in_layer.get(_whole(place, what), []), kind, what)
        found[name].append(_whole(index, what))
    return dict(found)


def _of_layer(names: list[str], kind: str, what: str) -> str:
    """The one module of a layer."""
    if not names:
        raise ValueError(f"{what}, whose layer must have a module of kind {kind!r} in sizes")
    if len(names) > 1:
        why = "a mixture of experts" if is_expert(names[0]) else "several modules"
        raise ValueError(
            f"{what}, whose layer has {why} of kind {kind!r}: give the module's name, such as "
            f"{names[0]!r}"
        )
    return names[0]


def _whole(number: Any, what: str) -> int:
    # bool is an int to Python, and a column of flags is no column of numbers.
    if not isinstance(number, bool):
        try:
            return operator.index(number)  # numpy's integers too
        except TypeError:
            pass
    raise ValueError(f"{what}, must have a whole number in the place of {number!r}")


def _some(names: Collection[str]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
