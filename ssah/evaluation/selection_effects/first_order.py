"""A screen: what taking selections out does to first order, for all of them in one backward pass.

With a_j(t) what unit j puts into B at token t, and E the log-probability of the response, of a
selection:

    E without it - E    is about    - sum over its units j, over tokens t of a_j(t) dE/da_j(t)

Example: E = 3 a - a^2 at a = 1 has the slope 1. Taking the unit out (a = 0) changes E by -2, and to
first order by -1. So a screen ranks; it does not measure. `ranking_agreement` says how well.

Source: Molchanov et al. 2019, arXiv 1906.10771 (Taylor, by units).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.attribution import attribute
from ssah.data import check_count
from ssah.units import UnitSet, check_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def first_order_effects(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    selections: Sequence[UnitSet],
) -> Tensor:
    """By how much the log-probability of the response falls without each selection, to first order.

    It stands for ``effects(...).mean("log_prob")``, for any number of selections at the cost of one
    pass forward and back. The model is left as it was.

    Args:
        model: a causal language model of transformers.
        loader: batches with ``input_ids`` and ``labels``.
        selections: what would be taken out, each by itself.

    Returns:
        float64 ``[selections]``, the mean over rows in nats.

    Raises:
        TypeError: a selection is no `UnitSet`, or a batch is not of this form.
        ValueError: no selection, no batch, a batch without labels, or a selection of another model.
        FloatingPointError: activations or gradients are NaN or infinite; the module is named.
    """
    if not selections:
        raise ValueError("selections is empty, must have at least one")
    for units in selections:
        check_units(model, units)
    counted = _CountedRows(loader)
    # All tokens count: a unit that is taken out is out everywhere. The loss is the labels' alone.
    signed = attribute(model, counted, metric="taylor", tokens="all", process_group=None).signed
    assert signed is not None
    # `signed` is of the loss, -E: where that falls as a unit is removed, E rises.
    rises = [
        sum(float(signed[name][index].sum()) for name, index in units.items())
        for units in selections
    ]
    return -torch.tensor(rises, dtype=torch.float64) / counted.rows


class _CountedRows:
    """The batches of a loader, which must have labels; counts their rows as they are taken."""

    def __init__(self, loader: Iterable[Mapping[str, Any]]) -> None:
        self._loader = loader
        self.rows = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for number, batch in enumerate(self._loader):
            # Without them every token would be one to predict. Other slips `attribute` refuses.
            if isinstance(batch, Mapping) and batch.get("labels") is None:
                raise ValueError(f"batch {number} has no labels, must have them: the response")
            yield batch
            self.rows += len(batch["labels"])


@dataclass(frozen=True)
class RankingAgreement:
    """How well a screen ranks.

    Attributes:
        spearman: rank correlation, from -1 to 1; ties share their mean rank.
        overlap: share of the k best by the screen that are among the k best.
        chance: the overlap that is expected of a screen that ranks at random.
    """

    spearman: float
    overlap: float
    chance: float


def ranking_agreement(screened: Tensor, measured: Tensor, k: int) -> RankingAgreement:
    """Compare the ranking of a screen with that of measured effects, largest first.

    Args:
        screened, measured: ``[selections]``, such as `first_order_effects` and
            ``effects(...).mean("kl")``, of the same selections. Measure some drawn at random: among
            those that the screen has chosen, it is compared on its own choice.
        k: how many count as the best.

    Raises:
        ValueError: shapes differ, ``k`` is out of range, or all of one are equal.
    """
    from scipy.stats import spearmanr  # half a second that only this needs

    check_count("k", k)
    n = len(measured) if measured.dim() else 0
    if measured.dim() != 1 or screened.shape != measured.shape or not k <= n:
        raise ValueError(
            f"screened is {list(screened.shape)}, measured {list(measured.shape)} and k {k}; they "
            "must be [selections], as many each, and k no more than that"
        )
    for name, values in (("screened", screened), ("measured", measured)):
        if not bool((values != values[0]).any()):
            raise ValueError(f"{name} has one value {n} times; it must have different ones to rank")
    best = [
        set(each.double().argsort(descending=True, stable=True)[:k].tolist())
        for each in (screened, measured)
    ]
    correlation = float(spearmanr(screened.double().numpy(), measured.double().numpy()).statistic)
    return RankingAgreement(correlation, len(best[0] & best[1]) / k, k / n)
