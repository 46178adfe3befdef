"""What a selection is made of: units, heads, key/value heads, layers or whole parameters.

Each granularity says which entries its things have, and which of its things lie wholly in a set of
entries. Example: grouped-query attention with two query heads for each key/value head. Query head 0
has its rows of Q and its columns of O. The rows of K and V that it shares with head 1 are

    with shared="all"   chosen where heads 0 and 1 both are: nobody else reads what is chosen
    with shared="any"   chosen where one of them is: all that a chosen head reads is chosen

What trains is chosen by "all", and what must stay by "any". Then to train some heads and to freeze
all others is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ssah.choices import Shared
from ssah.units import (
    AttentionHeads,
    UnitSet,
    UnitSlice,
    check_parameters,
    find_heads,
    find_modules,
    layer_names,
    layers_path,
)

Kind = Literal["layers", "kv_heads", "heads", "units", "parameters"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # from the largest, as a set is taken apart
SHARED: tuple[Shared, ...] = get_args(Shared)

Shapes = Mapping[str, tuple[int, ...]]
Chosen = Callable[[str], Tensor]  # a parameter's name -> bool, broadcasting over it


class Granularity(ABC):
    """Things of one kind in one model.

    Attributes:
        sizes: their scope, as a `UnitSet` over them has it: for heads, O's name -> how many.
    """

    sizes: dict[str, int]

    @abstractmethod
    def entries(self, things: UnitSet) -> dict[str, Tensor]:
        """The entries of some things: parameter -> bool ``[...]``, broadcasting over it."""

    @abstractmethod
    def inside(self, chosen: Chosen) -> UnitSet:
        """The things that lie wholly in ``chosen``; entries that others share are not asked for."""


class Owned(Granularity):
    """Things that have rows and columns of projections: units and heads."""

    def __init__(
        self, slices: Mapping[str, Sequence[UnitSlice]], shapes: Shapes, shared: Shared
    ) -> None:
        """``slices`` by module; their index is int64 ``[things, entries of one]``."""
        self.sizes = {name: len(own[0].index) for name, own in slices.items()}
        self._slices, self._shapes, self._shared = slices, shapes, shared

    def entries(self, things: UnitSet) -> dict[str, Tensor]:
        """As of `Granularity`: bool ``[...]``, of size 1 in dimensions that run over no things."""
        masks: dict[str, Tensor] = {}
        for name, numbers in things.items():
            for own in self._slices[name] if len(numbers) else ():
                shape = self._shapes[own.param]
                dims = _dims(own)
                if own.param not in masks:
                    wide = [size if dim in dims else 1 for dim, size in enumerate(shape)]
                    masks[own.param] = torch.zeros(wide, dtype=torch.bool)
                mask = masks[own.param]
                # All experts of a layer lie in one parameter: each writes into its own part.
                mask = mask if own.expert is None else mask[own.expert]
                size = shape[dims[-1]]
                of_chosen = torch.bincount(own.index[numbers].flatten(), minlength=size)  # [size]
                entries = of_chosen > 0
                if self._shared == "all":
                    # Where fewer are chosen than read it, somebody who is not chosen reads it too.
                    entries &= of_chosen == torch.bincount(own.index.flatten(), minlength=size)
                mask |= entries.view([size if dim == own.dim else 1 for dim in range(mask.dim())])
        return masks

    def inside(self, chosen: Chosen) -> UnitSet:
        """As of `Granularity`; ``chosen`` gives bool ``[...]``."""
        found: dict[str, Tensor] = {}
        for name, slices in self._slices.items():
            flags = torch.ones(self.sizes[name], dtype=torch.bool)
            for own in slices:
                size = self._shapes[own.param][_dims(own)[-1]]
                feeds = torch.bincount(own.index.flatten(), minlength=size)  # [size]
                whole = along(chosen(own.param), own, size)  # [size]
                # What several read is no evidence: it may be missing because of the others.
                flags &= (whole | (feeds > 1))[own.index].all(1)  # [things]
                if not flags.any():  # no other slice can bring one back
                    break
            found[name] = flags.nonzero()[:, 0]
        return UnitSet(found, self.sizes)


def along(mask: Tensor, own: UnitSlice, size: int) -> Tensor:
    """Which entries along the dimension of a slice a mask has whole: bool ``[size]``.

    ``mask`` is bool ``[...]`` and broadcasts over the parameter, of experts over all of them.
    """
    if own.expert is not None:
        mask = mask[own.expert if len(mask) > 1 else 0]
    mask = mask.movedim(own.dim, 0)
    return mask.reshape(len(mask), -1).all(1).expand(size)


def _dims(own: UnitSlice) -> tuple[int, ...]:
    """The dimensions of the parameter that run over experts and over things."""
    return (own.dim,) if own.expert is None else (0, own.dim + 1)


class Layers(Granularity):
    """Decoder layers: every parameter in them."""

    def __init__(self, path: str, names: Sequence[str], shapes: Shapes) -> None:
        self.sizes = {path: len(names)}
        self._path = path
        # With the dot: layer 1 is not the beginning of layer 10.
        self._parameters = [
            [param for param in shapes if param.startswith(f"{name}.")] for name in names
        ]
        self._shapes = shapes

    def entries(self, things: UnitSet) -> dict[str, Tensor]:
        """As of `Granularity`: bool ``[1, ...]``."""
        numbers = things[self._path].tolist()
        return {
            param: torch.ones([1] * len(self._shapes[param]), dtype=torch.bool)
            for number in numbers
            for param in self._parameters[number]
        }

    def inside(self, chosen: Chosen) -> UnitSet:
        """As of `Granularity`; ``chosen`` gives bool ``[...]``."""
        numbers = [
            number
            for number, params in enumerate(self._parameters)
            if all(bool(chosen(param).all()) for param in params)
        ]
        return UnitSet({self._path: numbers}, self.sizes)


class Parameters(Granularity):
    """Whole parameters. Those of one shape are a module: one may take the place of another."""

    def __init__(self, shapes: Shapes) -> None:
        self._names: dict[str, list[str]] = {}
        # By shape, so that what is drawn in the place of one has its size.
        for name, shape in shapes.items():
            self._names.setdefault(str(list(shape)), []).append(name)
        self.sizes = {shape: len(names) for shape, names in self._names.items()}
        self._shapes = shapes

    def entries(self, things: UnitSet) -> dict[str, Tensor]:
        """As of `Granularity`: bool ``[1, ...]``."""
        chosen = [self._names[shape][n] for shape, own in things.items() for n in own.tolist()]
        return {
            name: torch.ones([1] * len(self._shapes[name]), dtype=torch.bool) for name in chosen
        }

    def inside(self, chosen: Chosen) -> UnitSet:
        """As of `Granularity`; ``chosen`` gives bool ``[...]``."""
        numbers = {
            shape: [n for n, name in enumerate(names) if bool(chosen(name).all())]
            for shape, names in self._names.items()
        }
        return UnitSet(numbers, self.sizes)


def granularity(model: nn.Module, shapes: Shapes, kind: Kind, shared: Shared) -> Granularity:
    """The things of one kind in ``model``.

    Args:
        model: a transformers model of a known family.
        shapes: of its parameters.
        kind: of `KINDS`.
        shared: when an entry that several things share is chosen.

    Raises:
        ValueError: the model has no such things.
    """
    if kind == "layers":
        return Layers(layers_path(model), layer_names(model), shapes)
    if kind == "parameters":
        return Parameters(shapes)
    if kind == "units":
        owned = {
            name: [_in_columns(own) for own in (*module.inputs, module.output)]
            for name, module in find_modules(model).items()
        }
    else:
        every = find_heads(model).values()
        slices = _slices if kind == "heads" else _slices_by_group
        owned = {heads.name: slices(heads) for heads in every}
    params = {own.param for each in owned.values() for own in each}
    check_parameters(model, params - shapes.keys(), "to be selected")
    return Owned(owned, shapes, shared)


def _in_columns(own: UnitSlice) -> UnitSlice:
    """The slice of units with an index ``[units, 1]``."""
    return replace(own, index=own.index[:, None])


def _slices(heads: AttentionHeads) -> list[UnitSlice]:
    return [*heads.inputs, heads.output]


def _slices_by_group(heads: AttentionHeads) -> list[UnitSlice]:
    """The slices of key/value heads, with an index ``[n_kv_heads, entries of one]``."""
    queries = heads.n_heads // heads.n_kv_heads
    found = []
    for own in _slices(heads):
        index = own.index.view(heads.n_kv_heads, queries, -1)
        # Rows of K and V are there once for each query head that reads them: once is enough.
        if queries > 1 and torch.equal(index[:, 0], index[:, 1]):
            index = index[:, :1]
        found.append(replace(own, index=index.flatten(1)))
    return found
