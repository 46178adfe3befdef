"""Sets of units and their algebra."""

from __future__ import annotations

import operator
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["UnitSet"]


class UnitSet:
    """A set of units: for every depth-2 module of a scope, the sorted indices that belong to it.

    Access is that of a mapping from B's name to an int64 tensor (empty where the set holds none of
    that module's units), but ``len`` is the number of *units*. ``|``, ``&`` and ``-`` are union,
    intersection and difference, over the union of both scopes. Instances do not change.

    Args:
        indices: B's name -> indices, in any order. Modules left out hold no unit.
        sizes: B's name -> ``n_units``, for every module of the scope.

    Raises:
        ValueError: an index out of range, not an integer, or of a module outside the scope.
    """

    def __init__(
        self, indices: Mapping[str, Tensor | Sequence[int]], sizes: Mapping[str, int]
    ) -> None:
        outside = [name for name in indices if name not in sizes]
        if outside:
            raise ValueError(f"indices has modules that sizes lacks: {', '.join(outside)}")
        self._sizes = {name: _checked_size(name, size) for name, size in sizes.items()}
        self._indices = {
            name: _checked_index(name, indices.get(name, ()), size)
            for name, size in self._sizes.items()
        }

    @classmethod
    def random(
        cls, like: UnitSet | int, sizes: Mapping[str, int] | None = None, seed: int = 0
    ) -> UnitSet:
        """Units drawn uniformly without replacement; the same arguments give the same units.

        Args:
            like: a set, to draw as many units from each module as it has there; or a number of
                units, to draw that many from the whole scope.
            sizes: the scope; by default that of ``like``.
            seed: of the generator.

        Raises:
            ValueError: ``sizes`` is missing for a number, or there are fewer units than asked for.
        """
        if sizes is None:
            if not isinstance(like, UnitSet):
                raise ValueError("sizes is None, must be given when like is a number of units")
            sizes = like.sizes
        generator = torch.Generator().manual_seed(seed)
        if isinstance(like, UnitSet):
            counts = {name: len(index) for name, index in like.items()}
            short = [name for name, count in counts.items() if count > sizes.get(name, 0)]
            if short:
                raise ValueError(f"sizes has too few units in: {', '.join(short)}")
            drawn = {
                name: torch.randperm(sizes[name], generator=generator)[:count]
                for name, count in counts.items()
            }
            return cls(drawn, sizes)
        total = sum(sizes.values())
        if not 0 <= like <= total:
            raise ValueError(f"like is {like} units, must be between 0 and {total}")
        mask = torch.zeros(total, dtype=torch.bool)
        mask[torch.randperm(total, generator=generator)[:like]] = True
        parts = mask.split(list(sizes.values()))
        return cls(
            {name: part.nonzero()[:, 0] for name, part in zip(sizes, parts, strict=True)}, sizes
        )

    @property
    def sizes(self) -> dict[str, int]:
        """``n_units`` of every module of the scope."""
        return dict(self._sizes)

    @property
    def fraction(self) -> float:
        """Share of all units of the scope that are in the set, in [0, 1]."""
        total = sum(self._sizes.values())
        return len(self) / total if total else 0.0

    def mask(self, name: str) -> Tensor:
        """Bool ``[n_units]`` of module ``name``: True where the unit is in the set."""
        mask = torch.zeros(self._sizes[name], dtype=torch.bool)
        mask[self._indices[name]] = True
        return mask

    def complement(self) -> UnitSet:
        """All units of the scope that are not in the set."""
        return UnitSet({name: (~self.mask(name)).nonzero()[:, 0] for name in self}, self._sizes)

    def __getitem__(self, name: str) -> Tensor:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __contains__(self, name: object) -> bool:
        return name in self._indices

    def keys(self) -> KeysView[str]:
        """Names of B."""
        return self._indices.keys()

    def items(self) -> ItemsView[str, Tensor]:
        """Names of B with the indices of their units, int64, sorted."""
        return self._indices.items()

    def __len__(self) -> int:
        return sum(len(index) for index in self._indices.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UnitSet):
            return NotImplemented
        return self._sizes == other._sizes and all(
            torch.equal(index, other._indices[name]) for name, index in self._indices.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: UnitSet) -> UnitSet:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: UnitSet) -> UnitSet:
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: UnitSet) -> UnitSet:
        return self._combine(other, lambda a, b: a & ~b)

    def _combine(self, other: UnitSet, rule: Callable[[Tensor, Tensor], Tensor]) -> UnitSet:
        if not isinstance(other, UnitSet):
            return NotImplemented
        for name, size in other._sizes.items():
            if self._sizes.get(name, size) != size:
                raise ValueError(
                    f"unit sets differ in the number of units of {name!r}: {self._sizes[name]} "
                    f"and {size}; they must be of the same model"
                )
        sizes = {**self._sizes, **other._sizes}
        nothing = UnitSet({}, sizes)
        indices = {}
        for name in sizes:
            left = self.mask(name) if name in self else nothing.mask(name)
            right = other.mask(name) if name in other else nothing.mask(name)
            indices[name] = rule(left, right).nonzero()[:, 0]
        return UnitSet(indices, sizes)

    def __repr__(self) -> str:
        return (
            f"UnitSet({len(self)} of {sum(self._sizes.values())} units ({self.fraction:.2%}) "
            f"in {len(self._sizes)} modules)"
        )


def _checked_size(name: str, size: int) -> int:
    number = operator.index(size)  # TypeError: it is no integer
    if number < 0:
        raise ValueError(f"sizes has {number} units for {name!r}, must have 0 or more")
    return number


def _checked_index(name: str, index: Tensor | Sequence[int], size: int) -> Tensor:
    tensor = torch.as_tensor(index, dtype=None if len(index) else torch.int64, device="cpu")
    if tensor.dim() != 1 or tensor.dtype == torch.bool or tensor.is_floating_point():
        raise ValueError(
            f"indices of {name!r} have dtype {tensor.dtype} and {tensor.dim()} dimensions, must be "
            "one dimension of integers (for a mask: mask.nonzero()[:, 0])"
        )
    tensor = torch.unique(tensor.to(torch.int64), sorted=True)
    if len(tensor) and not 0 <= int(tensor[0]) <= int(tensor[-1]) < size:
        raise ValueError(
            f"indices of {name!r} run from {int(tensor[0])} to {int(tensor[-1])}, "
            f"must be in [0, {size})"
        )
    return tensor
