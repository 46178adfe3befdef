"""Sets of units and their algebra.

A set is kept as one sorted tensor of positions among all units of its scope, the modules one after
the other. Over ``{"a": 5, "b": 3}`` for example the units 1 and 4 of a and 0 of b are [1, 4, 5].
Union, intersection and difference of sets over thousands of modules are then one operation on masks
of all units. What belongs to each module is cut out where somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ssah.choices import Kind, check_choice
from ssah.units.frames import unit_frame
from ssah.units.pairs import indices_of
from ssah.units.positions import checked_size, flattened
from ssah.units.ranking import split
from ssah.units.tool_hooks import LensHook, nnterp_hook, transformer_lens_hooks

if TYPE_CHECKING:
    from pandas import DataFrame

_TOOLS = ("transformer_lens", "nnterp")


class UnitSet:
    """A set of units: for every depth-2 module of a scope, the sorted indices that belong to it.

    Access is that of a mapping from B's name to an int64 tensor (empty where the set holds none of
    that module's units), but ``len`` is the number of *units*. ``|``, ``&`` and ``-`` are union,
    intersection and difference, over the union of both scopes. Instances do not change.

    Args:
        indices: B's name -> indices ``[n]``, in any order. Modules left out hold no unit.
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
        self._sizes = {name: checked_size(name, size) for name, size in sizes.items()}
        self._flat = flattened(indices, self._sizes)

    @classmethod
    def of_mask(cls, mask: Tensor, sizes: Mapping[str, int]) -> UnitSet:
        """The units where ``mask`` is True: bool ``[units]``, the modules one after the other.

        Raises:
            ValueError: ``mask`` has another number of units than ``sizes`` together, or no bools.
        """
        units = cls({}, sizes)
        total = sum(units._sizes.values())
        if mask.dtype != torch.bool or tuple(mask.shape) != (total,):
            raise ValueError(
                f"mask is {mask.dtype} {list(mask.shape)}, must be torch.bool [{total}]"
            )
        units._flat = mask.nonzero()[:, 0]  # sorted, each once
        return units

    @classmethod
    def from_pairs(
        cls,
        pairs: Iterable[tuple[str | int, int]],
        sizes: Mapping[str, int],
        *,
        kind: Kind = "mlp",
    ) -> UnitSet:
        """Units that are given one by one, as in a CSV file or a paper.

        Example: ``from_pairs([(3, 17), ("model.layers.5.mlp.down_proj", 4)], groups.sizes)``.

        Args:
            pairs: of a module's name, or the number of a layer, and the index of a unit there.
                What is given twice is there once.
            sizes: B's name -> ``n_units``, for every module of the scope.
            kind: which module of a layer its number means: ``"mlp"`` or ``"attention"``.

        Raises:
            ValueError: a pair is none, or names what ``sizes`` lacks; its position is named.
        """
        check_choice("kind", kind, ("mlp", "attention"))
        return cls(indices_of(pairs, sizes, kind), sizes)

    @cached_property
    def _indices(self) -> dict[str, Tensor]:
        """B's name -> indices in that module, int64, sorted."""
        return split(self._flat, list(self._sizes), self._sizes)

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
        # A generator of its own: neither the caller's draws nor the device change what is drawn.
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
        return cls.of_mask(mask, sizes)

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
        return UnitSet.of_mask(~self.over(self._sizes), self._sizes)

    def __invert__(self) -> UnitSet:
        return self.complement()

    def __getitem__(self, name: str) -> Tensor:  # [n]
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __contains__(self, name: object) -> bool:
        return name in self._sizes

    def keys(self) -> KeysView[str]:
        """Names of B."""
        return self._sizes.keys()

    def items(self) -> ItemsView[str, Tensor]:
        """Names of B with the indices of their units, int64 ``[n]``, sorted."""
        return self._indices.items()

    def to_frame(self) -> DataFrame:
        """A table of pandas with a row for each unit: ``module``, ``layer``, ``kind``, ``unit``.

        `from_pairs` takes it back: ``zip(frame["module"], frame["unit"])``.
        """
        return unit_frame(self._indices)

    @overload
    def to_hooks(self, tool: Literal["transformer_lens"]) -> list[LensHook]: ...

    @overload
    def to_hooks(self, tool: Literal["nnterp"]) -> Callable[[Any], None]: ...

    def to_hooks(self, tool: str) -> list[LensHook] | Callable[[Any], None]:
        """What ablates these units in another tool, as `ssah.ablate` does here.

        Args:
            tool: ``"transformer_lens"``, whose ``run_with_hooks(fwd_hooks=...)`` takes the list
                that comes back; or ``"nnterp"``, for a function of the model that is called inside
                ``with model.trace(...)``.

        Raises:
            ValueError: another tool, or units that it has no place for, such as those of routed
                experts; the module is named.
        """
        check_choice("tool", tool, _TOOLS)
        if tool == "nnterp":
            return nnterp_hook(self._indices)
        return transformer_lens_hooks(self._indices, self._sizes)

    def __len__(self) -> int:
        return len(self._flat)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UnitSet):
            return NotImplemented
        # The order of modules makes no difference, but positions can be compared only in one order.
        if list(self._sizes.items()) == list(other._sizes.items()):
            return torch.equal(self._flat, other._flat)
        return self._sizes == other._sizes and torch.equal(self._flat, other._over(self._sizes))

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
        return UnitSet.of_mask(rule(self.over(sizes), other.over(sizes)), sizes)

    def over(self, sizes: Mapping[str, int]) -> Tensor:
        """Bool ``[units]`` over a scope that has every module of this one: True in the set."""
        mask = torch.zeros(sum(sizes.values()), dtype=torch.bool)
        mask[self._over(sizes)] = True
        return mask

    def _over(self, sizes: Mapping[str, int]) -> Tensor:
        """The units as positions among all units of another scope that has every module of this."""
        if list(sizes) == list(self._sizes):
            return self._flat
        ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        starts = dict(zip(sizes, ends, strict=False))
        moved = [index + starts[name] for name, index in self._indices.items()]
        # The empty tensor is for a set over no module at all.
        return torch.cat([*moved, torch.zeros(0, dtype=torch.int64)]).sort().values

    def __repr__(self) -> str:
        return (
            f"UnitSet({len(self)} of {sum(self._sizes.values())} units ({self.fraction:.2%}) "
            f"in {len(self._sizes)} modules)"
        )
