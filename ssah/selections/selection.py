"""What a method touches: entries of the parameters of one model, and the algebra of such sets.

For every parameter the set has a mask of bits that broadcasts over it (`ssah.selections.masks`).
Of a model with a projection Q ``[4, 3]`` of two heads, O ``[3, 4]`` and a norm ``[3]``:

    head 1                     Q: rows 2 and 3, a mask [4, 1]      O: columns 2 and 3, [1, 4]
    head 1 | the norm          the same, and the norm: [1]
    ~(head 1 | the norm)       Q: rows 0 and 1                     O: columns 0 and 1

Beside the entries it knows of which kinds of things it was made, heads here and parameters. That
changes no entry; a random selection like it is drawn by it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ssah.choices import Shared
from ssah.selections.granularities import KINDS, Granularity, Kind, along, granularity
from ssah.selections.masks import bits_of, combined, count, none
from ssah.selections.outline import Outline
from ssah.selections.saving import Made, load_masks, save_masks
from ssah.units import BitMask, UnitSet, check_units, find_modules

_AT_HAND = 8  # parameters whose masks are kept unpacked while things are looked for in them


class Selection:
    """A set of single entries of the parameters of one model. It does not change.

    Made by `ssah.select` and by the functions in `ssah.selections`. ``|``, ``&`` and ``-`` are
    union, intersection and difference; ``~`` is over all parameters of the model. A `UnitSet` of
    the model may stand on either side of an operator. ``len`` is the number of entries. Two
    selections are equal where they have the same entries, however they were made.

    Args:
        masks: parameter -> mask, of the parameter's shape or with size 1 where it does not change.
        outline: of the model.
        made_of: the kinds of things that it was made of.
    """

    def __init__(
        self, masks: Mapping[str, BitMask], outline: Outline, made_of: Made = frozenset()
    ) -> None:
        self._masks = {name: masks[name] for name in outline.shapes if _any(masks.get(name))}
        self.outline, self.made_of = outline, made_of

    @classmethod
    def made(cls, masks: Mapping[str, Tensor], outline: Outline, *made_of: Any) -> Selection:
        """The entries where masks are True: bool ``[...]`` each, broadcasting over the parameter.

        ``made_of`` is as of the class.
        """
        bits = {name: bits_of(mask) for name, mask in masks.items()}
        return cls(bits, outline, frozenset(made_of))

    # -------------------------------------------------------------------------------- looking

    def __len__(self) -> int:
        return sum(self.counts.values())

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many entries are chosen of each parameter that has some."""
        return {name: count(mask, self.shapes[name]) for name, mask in self._masks.items()}

    @property
    def fraction(self) -> float:
        """Share of all entries of all parameters that is chosen, in [0, 1]."""
        total = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return len(self) / total

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the model."""
        return self.outline.shapes

    def __iter__(self) -> Iterator[str]:
        """Names of the parameters that have chosen entries."""
        return iter(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __getitem__(self, name: str) -> BitMask:
        """The mask of a parameter, with size 1 along dimensions in which it does not change."""
        return self._masks.get(name) or none(len(self.shapes[name]))

    def mask(self, name: str) -> Tensor:
        """Bool ``[...]`` on the CPU, True where an entry is chosen; it broadcasts over ``name``."""
        return self[name].to_mask()

    @property
    def whole(self) -> tuple[str, ...]:
        """The parameters that are chosen whole."""
        return tuple(name for name, mask in self._masks.items() if mask.count == mask.numel == 1)

    def __repr__(self) -> str:
        return (
            f"Selection({len(self):,} weights ({self.fraction:.2%}), "
            f"{len(self.whole)} parameters whole and {len(self._masks) - len(self.whole)} in part, "
            f"model={self.outline.model_name!r})"
        )

    # -------------------------------------------------------------------------------- algebra

    def __or__(self, other: Selection | UnitSet) -> Selection:
        return self._combine(other, operator.or_)

    def __and__(self, other: Selection | UnitSet) -> Selection:
        return self._combine(other, operator.and_)

    def __sub__(self, other: Selection | UnitSet) -> Selection:
        return self._combine(other, operator.sub)

    def __ror__(self, other: UnitSet) -> Selection:
        return self | other

    def __rand__(self, other: UnitSet) -> Selection:
        return self & other

    def __rsub__(self, other: UnitSet) -> Selection:
        return ~self & other  # of the units, what is not in it

    def __invert__(self) -> Selection:
        masks = {name: ~self[name] for name in self.shapes}
        # All but some heads are heads: a control of it is drawn by the same granularity.
        return Selection(masks, self.outline, self.made_of)

    def complement(self) -> Selection:
        """Every entry of every parameter of the model that is not chosen."""
        return ~self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        same = self.outline.fingerprint == other.outline.fingerprint
        return same and self._masks == other._masks

    # Equal selections may have been made in different ways: no cheap number tells them alike.
    __hash__ = None  # type: ignore[assignment]

    def _combine(
        self, other: Selection | UnitSet, rule: Callable[[BitMask, BitMask], BitMask]
    ) -> Selection:
        if isinstance(other, UnitSet):
            other = of_units(self.outline, other)
        if not isinstance(other, Selection):
            return NotImplemented
        self.outline.check(other.outline, "that of the other one")
        # What stands in one of the two alone: gone, kept, or taken over, by rule.
        masks = {} if rule is operator.and_ else dict(self._masks)
        if rule is operator.or_:
            masks |= other._masks
        # Where one of the two has nothing, what comes of it is known without a look at the bits.
        for name in self._masks.keys() & other._masks.keys():
            masks[name] = combined(self[name], other[name], rule)
        # One that was loaded without its model may meet one that knows it.
        outline = self.outline if self.outline.reference is not None else other.outline
        return Selection(masks, outline, self.made_of | other.made_of)

    def within(self, start: str) -> Selection:
        """What of it is in parameters whose names start so."""
        masks = {name: mask for name, mask in self._masks.items() if name.startswith(start)}
        return Selection(masks, self.outline, self.made_of)

    # ------------------------------------------------------------------------ what it is made of

    def things(self) -> tuple[dict[tuple[Kind, Shared], UnitSet], Selection]:
        """The things that lie wholly in it, of the kinds that it was made of, and what is left.

        The largest come first: a head in a layer that is chosen whole is no head of its own.

        Returns:
            (kind, how shared entries are chosen) -> the things, as a `UnitSet` over them: of
            ``"layers"`` the module is the list of layers, of ``"heads"`` and ``"kv_heads"`` it is
            O, of ``"units"`` B, of ``"parameters"`` a shape; and the entries that are in none.

        Raises:
            ValueError: the model is not at hand.
        """
        parts, rest = self._taken_apart()
        return {key: things for key, _, things in parts}, rest

    def _taken_apart(
        self,
    ) -> tuple[list[tuple[tuple[Kind, Shared], Granularity, UnitSet]], Selection]:
        """The same, with what says which entries the things of each kind have."""
        rest, found = self, []
        for key in sorted(self.made_of, key=lambda key: (KINDS.index(key[0]), key[1])):
            own = granularity(self.outline.model, self.shapes, *key)
            things = own.inside(lru_cache(_AT_HAND)(rest.mask))
            if len(things):
                found.append((key, own, things))
                # What a layer has must not be found once more as its heads.
                rest = rest - Selection.made(own.entries(things), self.outline)
        return found, rest

    @classmethod
    def random(cls, like: Selection, seed: int = 0) -> Selection:
        """A selection of the same granularity and size, drawn uniformly; the control of ``like``.

        It has as many heads and units of each module as ``like``, as many layers, and as many whole
        parameters of each shape. What is none of these is drawn parameter by parameter: as many
        rows, columns or single weights. Each kind is drawn by itself. Where the draws of a mixed
        selection meet, fewer entries are chosen: compare `fraction`. The same arguments give the
        same entries.

        Raises:
            ValueError: the model is not at hand.
        """
        parts, rest = like._taken_apart()
        drawn = cls({}, like.outline, like.made_of)
        for _, own, things in parts:
            drawn = drawn | cls.made(own.entries(UnitSet.random(things, seed=seed)), like.outline)
        # A seed for each parameter: else masks of one shape would all be drawn alike.
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (len(rest._masks),), generator=generator).tolist()
        masks = {
            name: BitMask.random(mask, seed=own)
            for (name, mask), own in zip(rest._masks.items(), seeds, strict=True)
        }
        return drawn | cls({name: bits_of(m.to_mask()) for name, m in masks.items()}, like.outline)

    def of(self, model: nn.Module) -> Selection:
        """The same selection, of this model: a copy of the one that it was made on, for instance.

        Raises:
            ValueError: the model has other units, parameters or shapes.
        """
        outline = Outline.of(model)
        self.outline.check(outline, "the model")
        return Selection(self._masks, outline, self.made_of)

    @property
    def units(self) -> UnitSet:
        """The units whose columns of B are chosen whole, over every module of the model.

        Without its column a unit puts out nothing. So of heads they are the channels that enter O.

        Raises:
            ValueError: the model is not at hand.
        """
        modules, mask = find_modules(self.outline.model), lru_cache(_AT_HAND)(self.mask)
        found: dict[str, Tensor] = {}
        for name, module in modules.items():
            own = module.output
            if own.param in self:
                size = self.shapes[own.param][own.dim + (own.expert is not None)]
                found[name] = along(mask(own.param), own, size)[own.index].nonzero()[:, 0]
        return UnitSet(found, {name: module.n_units for name, module in modules.items()})

    # --------------------------------------------------------------------------------- saving

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write it to a directory: safetensors and JSON, no pickle.

        A tensor for each parameter has the bits of its mask, uint8 ``[ceil(n / 8)]``.
        """
        save_masks(directory, self._masks, self.outline, self.made_of)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module | None = None) -> Selection:
        """Read what `save` wrote.

        Args:
            directory: where it was written to.
            model: the model that the selection is meant for. Without it the selection cannot be
                combined with a `UnitSet`, nor can one like it be drawn.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the directory holds something else or is damaged, or the model has other
                units, parameters or shapes.
        """
        found = cls(*load_masks(directory))
        return found if model is None else found.of(model)


def of_units(outline: Outline, units: UnitSet, shared: Shared = "all") -> Selection:
    """What units own, as a selection.

    Raises:
        ValueError: units of another model, or the model is not at hand.
    """
    check_units(outline.model, units)
    own = granularity(outline.model, outline.shapes, "units", shared)
    return Selection.made(own.entries(UnitSet({}, own.sizes) | units), outline, ("units", shared))


def _any(mask: BitMask | None) -> bool:
    return mask is not None and mask.count > 0
