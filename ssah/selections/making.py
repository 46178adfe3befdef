"""Making selections: units, heads, layers, whole parameters, rows and single weights of a model.

    heads(model, {2: [26]}) | layers(model, range(6, 13)) | parameters(model, ["model.norm*"])

A head has its rows of Q and its columns of O. With grouped-query attention several query heads read
one key/value head, whose rows of K and V they share (`ssah.selections.granularities`).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ssah.choices import Shared
from ssah.selections.granularities import SHARED, granularity
from ssah.selections.masks import bits_of, whole
from ssah.selections.naming import matching_parameters, row_numbers
from ssah.selections.outline import Outline
from ssah.selections.selection import Selection, of_units
from ssah.units import BitMask, UnitSet, find_heads


def units(model: nn.Module, chosen: UnitSet, *, shared: Shared = "all") -> Selection:
    """What units own: columns of B, rows of every A and its biases.

    Args:
        model: a transformers model of a known family.
        chosen: units of it.
        shared: a row of V that several heads share is chosen where ``"all"`` units that read it
            are, as `ssah.train_only` has it; or where ``"any"`` is, as `ssah.freeze` has it.

    Raises:
        TypeError, ValueError: units of another model, or an unknown architecture.
    """
    return of_units(Outline.of(model), chosen, _checked_shared(shared))


def heads(
    model: nn.Module,
    chosen: Mapping[int, Collection[int]],
    *,
    kv_heads: bool = False,
    shared: Shared = "all",
) -> Selection:
    """Attention heads: rows of Q, rows of K and V, their biases, and columns of O.

    Norms of queries and keys, which all heads of a layer share, are no part of a head.

    Args:
        model: a transformers model of a known family.
        chosen: number of a layer -> numbers of its query heads, both from 0.
        kv_heads: the numbers are of key/value heads, each with all query heads that share it.
        shared: rows of K and V that several query heads share are chosen where ``"all"`` of these
            are, or where ``"any"`` is.

    Raises:
        TypeError: the numbers are no whole numbers.
        ValueError: the model has no such layer or head, or its family no known heads.
    """
    outline, every = Outline.of(model), find_heads(model)
    of_name: dict[str, list[int]] = {}
    for layer, numbers in chosen.items():
        if layer not in every:
            raise ValueError(
                f"heads are of layer {layer}, which has none; layers with attention heads are "
                f"{_range(every)}"
            )
        own = every[layer]
        n = own.n_kv_heads if kv_heads else own.n_heads
        what = f"{'key/value' if kv_heads else 'query'} heads of layer {layer}"
        of_name[own.name] = _numbers(numbers, n, what)
    kind, rule = ("kv_heads" if kv_heads else "heads"), _checked_shared(shared)
    things = granularity(model, outline.shapes, kind, rule)  # type: ignore[arg-type]
    entries = things.entries(UnitSet(of_name, things.sizes))
    return Selection.made(entries, outline, (kind, rule))


def layers(model: nn.Module, chosen: Iterable[int]) -> Selection:
    """Whole decoder layers: every parameter in them, Q, K and norms included.

    Args:
        model: a transformers model of a known family.
        chosen: numbers of layers, from 0.

    Raises:
        TypeError, ValueError: no whole numbers, or the model has no such layer.
    """
    outline = Outline.of(model)
    own = granularity(model, outline.shapes, "layers", "all")
    ((path, n),) = own.sizes.items()
    numbers = _numbers(chosen, n, "layers")
    return Selection.made(
        own.entries(UnitSet({path: numbers}, own.sizes)), outline, ("layers", "all")
    )


def parameters(model: nn.Module, chosen: Collection[str]) -> Selection:
    """Whole parameters.

    Args:
        model: a transformers model of a known family.
        chosen: names in ``model.named_parameters()``, or patterns of them such as
            ``"model.norm*"``. Either name of tied weights is meant for both.

    Raises:
        TypeError, ValueError: no collection of names, or one that the model lacks.
    """
    outline = Outline.of(model)
    return of_parameters(outline, matching_parameters(model, chosen, "parameters"))


def rows(model: nn.Module, chosen: Mapping[str, Sequence[int] | Tensor]) -> Selection:
    """Rows of parameters, such as the tokens of an embedding or a head.

    Args:
        model: a transformers model of a known family.
        chosen: name of a parameter -> numbers of its rows, a list or a tensor ``[n]``. Either name
            of tied weights is meant for both.

    Raises:
        TypeError, ValueError: a name or a row that the model lacks, or that is none.
    """
    outline = Outline.of(model)
    result = Selection({}, outline)
    for name, numbers in chosen.items():
        (canonical,) = matching_parameters(model, [name], "rows")
        shape = outline.shapes[canonical]
        if not shape:
            raise ValueError(f"rows has {name!r}, which is a single number; it must have rows")
        result = result | of_rows(outline, {canonical: row_numbers(name, numbers, shape[0])})
    return result


def weights(model: nn.Module, chosen: Mapping[str, BitMask]) -> Selection:
    """Single weights.

    Args:
        model: a transformers model of a known family.
        chosen: name of a parameter -> which of its entries, of its shape. Either name of tied
            weights is meant for both.

    Raises:
        TypeError: it is no mapping, or a mask is no `BitMask`.
        ValueError: a name that the model lacks, or a mask of another shape.
    """
    if not isinstance(chosen, Mapping):
        raise TypeError(
            f"weights is a {type(chosen).__name__}, must be a mapping of parameter names to "
            "ssah.units.BitMask"
        )
    outline = Outline.of(model)
    masks: dict[str, BitMask] = {}
    for name, mask in chosen.items():
        (canonical,) = matching_parameters(model, [name], "weights")
        if not isinstance(mask, BitMask):
            raise TypeError(
                f"weights has a {type(mask).__name__} for {name!r}, must be a BitMask: "
                "ssah.units.BitMask.of(mask) of a bool tensor"
            )
        if mask.shape != outline.shapes[canonical]:
            raise ValueError(
                f"weights has a mask of shape {list(mask.shape)} for {name!r}, must have "
                f"{list(outline.shapes[canonical])}, the shape of the parameter"
            )
        mask = masks[canonical] | mask if canonical in masks else mask
        masks[canonical] = mask
    return Selection({name: bits_of(mask.to_mask()) for name, mask in masks.items()}, outline)


def _checked_shared(shared: Shared) -> Shared:
    if shared not in SHARED:
        raise ValueError(f"shared is {shared!r}, must be one of {', '.join(SHARED)}")
    return shared


def _numbers(numbers: Iterable[int], n: int, what: str) -> list[int]:
    """Numbers of layers or heads, once they are known to be below ``n``."""
    found = [operator.index(number) for number in numbers]  # TypeError: it is no integer
    wrong = [number for number in found if not 0 <= number < n]
    if wrong or not found:
        raise ValueError(
            f"{what} are {wrong[0] if wrong else 'none'}, must be whole numbers from 0 to {n - 1}"
        )
    return found


def _range(numbers: Collection[int]) -> str:
    listed = list(numbers)
    if listed == list(range(listed[0], listed[-1] + 1)):
        return f"{listed[0]} to {listed[-1]}"
    return ", ".join(map(str, listed))


def of_parameters(outline: Outline, names: Iterable[str]) -> Selection:
    """Whole parameters by the names that the outline has."""
    masks = {name: whole(len(outline.shapes[name])) for name in names}
    return Selection(masks, outline, frozenset({("parameters", "all")}))


def of_rows(outline: Outline, numbers: Mapping[str, Tensor]) -> Selection:
    """Rows of parameters: name that the outline has -> int64 ``[rows]``."""
    masks = {}
    for name, own in numbers.items():
        size, *rest = outline.shapes[name]
        masks[name] = torch.zeros(size, *[1] * len(rest), dtype=torch.bool)
        masks[name][own] = True
    return Selection.made(masks, outline)
