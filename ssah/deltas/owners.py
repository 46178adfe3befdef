"""Where the entries that units own lie in tensors as files have them.

An entry is a row of A or a column of B (:mod:`ssah.training.entries`). Of most models a file has
the model's own parameter. With 3 entries along dimension 0 of ``[3, 2]`` their numbers are, as a
tensor that broadcasts over the parameter, [[0], [1], [2]]. Where files keep a parameter in pieces,
a tensor of numbers is taken apart as saving takes the parameter apart. Mixtral's ``gate_up_proj``
``[experts, 2 units, hidden]``, for one, has 2 * units entries an expert, of which the file's ``w1``
of expert 0 has the numbers 0 to units - 1, and ``w3`` those from units on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssah.deltas.weights import Weights
from ssah.selections import Selection, narrowed
from ssah.training import Entries
from ssah.units import BitMask


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor in which units own entries.

    Attributes:
        name: of the tensor, as `Weights` has it.
        param: the parameter of the model that it is, or is a piece of.
        numbers: int64, the entry of ``param`` that each element is of; broadcasts over the tensor.
    """

    name: str
    param: str
    numbers: Tensor

    def add_sums(self, sums: Tensor, values: Tensor, rows: slice) -> None:
        """Add the values of some rows of the tensor to the sums over entries.

        Args:
            sums: float64 ``[entries]``, added to.
            values: float64 ``[rows, ...]``.
            rows: which rows they are.
        """
        numbers = self.numbers if len(self.numbers) == 1 else self.numbers[rows]
        for dim, size in enumerate(numbers.shape):
            if size == 1:
                values = values.sum(dim, keepdim=True)
        sums += torch.bincount(numbers.reshape(-1), values.reshape(-1), minlength=len(sums))


def places(weights: Weights, entries: Mapping[str, Entries]) -> Iterator[Place]:
    """Where the entries of parameters lie in the tensors of a model.

    Args:
        weights: the tensors.
        entries: name of a parameter -> its entries; which of them train is of no matter.

    Raises:
        ValueError: as of `Weights.in_pieces`.
    """
    for param, own in entries.items():
        shape = weights.model.get_parameter(param).shape
        sizes = [size if dim in own.dims else 1 for dim, size in enumerate(shape)]
        numbers = torch.arange(len(own.trains)).reshape(sizes)  # [.., entries, ..]
        # Expanded, they take no memory: what is made of them are mostly views.
        for name, piece in weights.in_pieces(param, numbers.expand(shape)).items():
            yield Place(name, param, narrowed(piece).contiguous())


def in_tensors(weights: Weights, selection: Selection) -> dict[str, BitMask]:
    """What a selection has of the tensors of a model.

    Args:
        weights: the tensors.
        selection: of their model.

    Returns:
        Name of a tensor -> mask, which broadcasts over it.

    Raises:
        ValueError: as of `Weights.in_pieces`.
    """
    return {
        name: BitMask.of(narrowed(piece))
        for param in selection
        for name, piece in weights.in_pieces(
            param, selection.mask(param).expand(selection.shapes[param])
        ).items()
    }
