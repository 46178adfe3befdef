"""Both measures of a model at once, before and after units are taken out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ssah.evaluation.measures.loss import utility_loss
from ssah.evaluation.measures.margin import refusal_margins
from ssah.interventions import ablate
from ssah.selections import Selection
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.groups import UnitGroups


@dataclass(frozen=True)
class Measurement:
    """What one model does.

    Attributes:
        utility_loss: nats per response token, see :func:`ssah.evaluation.utility_loss`.
        refusal_margin: nats per token, see :func:`ssah.evaluation.refusal_margin`.
        refuses: fraction in [0, 1] of the requests with a positive margin.
    """

    utility_loss: float
    refusal_margin: float
    refuses: float

    def to_dict(self) -> dict[str, float]:
        """As plain data, for JSON."""
        return asdict(self)


class Measures:
    """A model with the data that it is measured on.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's.
        loader: ordinary instructions with answers; iterated once a measurement.
        requests: harmful requests, as :func:`ssah.evaluation.refusal_margin` takes them.
        batch_size: of the requests.
        max_length: of the requests.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        loader: Iterable[Mapping[str, Any]],
        requests: Sequence[str | Mapping[str, Any]],
        batch_size: int = 8,
        max_length: int = 512,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.loader, self.requests = loader, requests
        self.batch_size, self.max_length = batch_size, max_length

    def __call__(self, ablated: UnitSet | Selection | None = None) -> Measurement:
        """Measure the model as it is, or with units ablated (they are put back afterwards)."""
        if ablated is not None:  # both measures of the same ablated model
            with ablate(self.model, ablated):
                return self()
        margins = refusal_margins(  # [requests]
            self.model,
            self.tokenizer,
            self.requests,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        return Measurement(
            utility_loss=utility_loss(self.model, self.loader),
            refusal_margin=float(margins.mean()),
            refuses=float((margins > 0).double().mean()),
        )


def ablations(
    measures: Measures,
    groups: UnitGroups,
    names: Iterable[str],
    *,
    random: bool = False,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Measure the model as it is, then with each group ablated; lazily, one row at a time.

    Args:
        measures: the model and the data.
        groups: of that model.
        names: groups to ablate, in this order.
        random: after each group, ablate as many random units of every module as the group has
            there.
        seed: of the random units.

    Yields:
        Plain dicts: ``group`` (None in the first row), ``random``, ``units``, ``fraction`` (of all
        units), and the fields of a :class:`Measurement`.
    """
    # The whole model comes first: everything is told against it.
    nothing = {"group": None, "random": False, "units": 0, "fraction": 0.0}
    yield {**nothing, **measures().to_dict()}
    for name in names:
        chosen = [(False, groups[name])]
        if random:
            chosen.append((True, UnitSet.random(groups[name], seed=seed)))
        for is_random, units in chosen:  # the group, then as many random units
            row = {"group": name, "random": is_random, "units": len(units)}
            yield {**row, "fraction": units.fraction, **measures(units).to_dict()}
