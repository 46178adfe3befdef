"""What is kept of the hidden states of a set of texts: sums, and no state of a single text.

Over n rows with the states h_1 ... h_n at one position of one layer:

    mean      m = sum_i h_i / n                    [hidden]
    m2        sum_i (h_i - m)^2, channel by channel [hidden]
    unit_sum  s = sum_i h_i / |h_i|                [hidden]

Example: the states (3, 0) and (0, 1) have the mean (1.5, 0.5), the m2 (4.5, 0.5) and the unit_sum
(1, 1). States of a batch are merged with those of before by Chan's formula, in float64, and so are
those of several ranks. How rows are batched, ordered and padded changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssah.distributed import Group, Ranks
from ssah.models import cheap_weights_hash
from ssah.representations.positions import Position, Positions, check_positions
from ssah.representations.recording import hidden_states
from ssah.units import config_hash
from ssah_kernels import ops
from ssah_kernels.reference.channel_moments import merge_moments_


@dataclass(frozen=True, eq=False)
class Representations:
    """The hidden states of a set of rows, reduced; layer l is what layer l puts out.

    Attributes:
        positions: at which tokens.
        rows: over how many rows.
        mean: float64 ``[positions, layers, hidden]``.
        m2: float64 ``[positions, layers, hidden]``, sum of squared deviations from the mean.
        unit_sum: float64 ``[positions, layers, hidden]``, the sum of states at length 1.
    """

    positions: tuple[Position, ...]
    rows: int
    mean: Tensor
    m2: Tensor
    unit_sum: Tensor

    @property
    def variance(self) -> Tensor:
        """Unbiased, of each channel over rows: float64 ``[positions, layers, hidden]``."""
        return self.m2 / (self.rows - 1)


def represent(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    positions: Positions = ("last",),
    process_group: Group = "auto",
) -> Representations:
    """Reduce the hidden states of a model on a set of rows, in one pass of its backbone.

    Memory does not grow with the number of rows. The model runs in evaluation mode, and is left as
    it was. Interventions that are under way count.

    Args:
        model: a transformers model of a known family.
        loader: batches as of `ssah.attribute`; each row has one prompt, and where there are labels
            one response.
        positions: ``"last"`` (token of the prompt), ``"first"`` (of the response), ``"response"``
            (the mean over it), or numbers below 0: -2 is the last but one token of the prompt.
        process_group: as of `ssah.attribute`: ranks with batches of their own get one result.

    Raises, on every rank if on one:
        TypeError: ``model`` is no transformers model, or a batch is not of this form.
        ValueError: no row; positions that are none, or that a row has not; a sharded model; ranks
            that differ, or that were all given the same batches.
        FloatingPointError: states are NaN or infinite; the layer is named.

    Source: means by layer and position, Arditi et al., arXiv 2406.11717.
    """
    ranks = Ranks.of(process_group)
    with ranks.agreeing():
        where = check_positions(positions)
        states = hidden_states(model, loader, positions=where)
        # For the comparison alone: it costs a pass over the weights.
        hashed = cheap_weights_hash(model) if ranks.size > 1 else None
    ranks.common(positions=list(where), config_hash=config_hash(model), weights_hash=hashed)
    sums = _Sums()
    with ranks.agreeing():
        for batch in states:
            sums.add(batch)
    return sums.joined(ranks, where)


class _Sums:
    """Count, mean, m2 and unit_sum of all positions and layers, in one row of channels."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()  # positions, layers, hidden; of no batch yet
        self._count = torch.zeros((), dtype=torch.float64)
        self._mean = self._m2 = self._unit_sum = torch.zeros(0, dtype=torch.float64)

    def add(self, states: Tensor) -> None:  # [rows, positions, layers, hidden]
        if not self._shape:
            self._begin(states.shape[1:])
        # [rows, channels]
        ops.channel_moments_(states.flatten(1), self._count, self._mean, self._m2)
        self._unit_sum += F.normalize(states, dim=-1).sum(0).flatten()

    def _begin(self, shape: Iterable[int]) -> None:
        self._shape = tuple(shape)
        zeros = torch.zeros(self._shape, dtype=torch.float64).flatten()  # [channels]
        self._mean, self._m2, self._unit_sum = zeros, zeros.clone(), zeros.clone()

    def joined(self, ranks: Ranks, positions: tuple[Position, ...]) -> Representations:
        """The result over all ranks, the same bits on each."""
        shape = ranks.common(shape=list(self._shape) or None)["shape"]
        if shape is None:
            raise ValueError("loader yielded no batch, must yield at least one")
        if not self._shape:
            self._begin(shape)
        own = torch.cat([self._count[None], self._mean, self._m2, self._unit_sum])
        told = ranks.gather(own)  # [ranks, 1 + 3 channels]
        ranks.check_dealt(bool(told[0, 0]) and bool((told == told[0]).all()))
        self._count.zero_()
        self._begin(shape)
        for each in told:
            mean, m2, unit_sum = each[1:].view(3, -1)  # [channels] each
            merge_moments_(self._count, self._mean, self._m2, each[0], mean, m2)
            self._unit_sum += unit_sum
        parts = (part.view(shape) for part in (self._mean, self._m2, self._unit_sum))
        return Representations(positions, int(self._count), *parts)
