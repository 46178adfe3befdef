"""A choice of single entries of one parameter, one bit each.

A weight of 4096 x 11008 has 45 M entries; its mask has 5.6 MB. The layout of the bits is that of
:mod:`ssah_kernels.bit_masks`: entry i in row-major order is bit i % 8 of byte i // 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ssah_kernels.bit_masks import count_bits, pack_bits, unpack_bits


@dataclass(frozen=True, eq=False)
class BitMask:
    """Some entries of a parameter: ``&``, ``|``, ``-`` and ``~`` as of sets. It does not change.

    Attributes:
        shape: of the parameter.
        bits: uint8 ``[ceil(n / 8)]`` on the CPU; those after the last entry are 0.
    """

    shape: tuple[int, ...]
    bits: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> BitMask:
        """The entries where ``mask`` is True: bool ``[*shape]``, as the parameter has it.

        Raises:
            TypeError: ``mask`` is not bool.
        """
        return cls(tuple(mask.shape), pack_bits(mask).cpu())

    @classmethod
    def random(cls, like: BitMask, seed: int = 0) -> BitMask:
        """As many entries as ``like`` has, drawn uniformly without replacement.

        The same arguments give the same entries. A generator of its own draws them.
        """
        generator = torch.Generator().manual_seed(seed)
        # Each by a draw of its own: to shuffle 45 M numbers takes a hundred times as long.
        mask = torch.rand(like.numel, generator=generator) < like.count / max(like.numel, 1)
        # Some are too many or missing. Which of them go or come is drawn too, so that every set of
        # this size is as likely as any other.
        while excess := int(mask.sum()) - like.count:
            places = torch.randint(like.numel, (4 * abs(excess),), generator=generator)
            places = places[mask[places] == (excess > 0)][: abs(excess)]
            mask[places] = excess < 0
        return cls.of(mask.view(like.shape))

    @property
    def numel(self) -> int:
        """Number of entries of the parameter."""
        return torch.Size(self.shape).numel()

    @cached_property
    def count(self) -> int:
        """Number of entries that are chosen."""
        return count_bits(self.bits)

    def to_mask(self) -> Tensor:
        """Bool ``[*shape]`` on the CPU: True where an entry is chosen."""
        return unpack_bits(self.bits, self.shape)

    def __and__(self, other: BitMask) -> BitMask:
        return BitMask(self.shape, self.bits & self._bits_of(other))

    def __or__(self, other: BitMask) -> BitMask:
        return BitMask(self.shape, self.bits | self._bits_of(other))

    def __sub__(self, other: BitMask) -> BitMask:
        return BitMask(self.shape, self.bits & ~self._bits_of(other))

    def __invert__(self) -> BitMask:
        return BitMask.of(torch.ones(self.shape, dtype=torch.bool)) - self

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BitMask)
            and self.shape == other.shape
            and torch.equal(self.bits, other.bits)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.count))

    def _bits_of(self, other: BitMask) -> Tensor:
        """Another mask's bits, of the same parameter.

        Raises:
            ValueError: the other is of another shape.
        """
        if other.shape != self.shape:
            raise ValueError(
                f"a mask of shape {list(other.shape)} meets one of {list(self.shape)}; both must "
                "be of the same parameter"
            )
        return other.bits
