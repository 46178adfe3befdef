"""SN-Tune: units that write much at every harmful request learn refusals, and nothing else moves.

Zhao et al., ICLR 2025. What unit j writes at token t is x_j(t) B[:, j]. Its importance for one
request is how much hidden states change without it,

    I_j(q) = mean over tokens t of q of |x_j(t) B[:, j]|^2

    safety neurons       in the top share of their module for every harmful request
    foundation neurons   the same over ordinary instructions
    SN-Tune              the safety neurons train on refusals, before the model meets any task
    RSN-Tune             those that are no foundation neurons do, which a task needs less

Example of one module with a share of one half: request 1 has I = (4, 3, 1, 0), request 2 has (3, 0,
9, 1). The halves are {0, 1} and {0, 2}, and the safety neuron is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ssah.attribution import attribute
from ssah.data import Encoded, encoded_rows, spread
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Loader, Need
from ssah.methods.outcomes import Edited
from ssah.methods.ranking import highest
from ssah.methods.trained_edits import trained_edit
from ssah.settings import setting
from ssah.training import UpdatePlan, train_on_rows, train_only
from ssah.units import UnitSet

_PAPER = "Zhao et al., Safety Mechanisms of LLMs via Safety-Specific Neurons, ICLR 2025"


@dataclass(frozen=True)
class SNTune(Method):
    """Teach refusals to safety neurons."""

    name: ClassVar[str] = "sn-tune"
    paper: ClassVar[str] = _PAPER
    equation: ClassVar[str] = (
        "trained on refusals: intersection over requests of the top units of each module"
    )
    stage: ClassVar[Stage] = "before"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "tokenizer")
    departures: ClassVar[tuple[str, ...]] = (
        "We know the paper from reviews and ports: rows of an update are ours, and so is a "
        "constant learning rate.",
        "Tokens of refusals count beside those of requests, where the rows have them.",
        "Units are channels of FFNs and of values; rows of queries and keys do not count.",
        "The paper does not say how many units a request has; the default share is ours.",
        "Nothing else moves, bit for bit; in ports of the method decay and momentum move more.",
    )
    against: ClassVar[str] = "The same training of as many random units of each module."
    published: ClassVar[str] = "Harmful score 65.5 -> 2.0 (Llama-3-8B-Instruct), under 1 % trained."

    share: float = setting(0.05, "Of a module's units, for one request.", above=0, max=1)
    refusals: int = setting(50, "Rows of the safety set that they train on, at most.", min=1)
    epochs: int = setting(1, "Passes over these.", min=1)
    lr: float = setting(1e-6, "Learning rate.", above=0)
    batch_size: int = setting(8, "Rows of an update.", min=1)
    seed: int = setting(0, "Of the order of rows.", min=0)

    def units(self, inputs: Inputs) -> UnitSet:
        """The safety neurons; errors as of `ssah.attribute`."""
        assert inputs.safety is not None
        return consistent_units(inputs.model, inputs.safety, self.share)

    def _find(self, inputs: Inputs) -> Edited:
        rows = spread(encoded_rows(inputs.safety or ()), self.refusals)
        units = self.units(inputs)
        # A plan refuses this too, but cannot say which setting made it so.
        if not len(units):
            raise ValueError(
                f"share is {self.share}, and no unit is in it for every request; raise it, or use "
                "fewer rows"
            )
        return trained_edit(inputs, units, train_only, lambda plan: self._train(plan, inputs, rows))

    def _train(self, plan: UpdatePlan, inputs: Inputs, rows: Sequence[Encoded]) -> None:
        assert inputs.tokenizer is not None
        train_on_rows(
            plan,
            inputs.tokenizer,
            rows,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=self.seed,
        )


@dataclass(frozen=True)
class RSNTune(SNTune):
    """Teach them to those no task needs."""

    name: ClassVar[str] = "rsn-tune"
    equation: ClassVar[str] = "trained on refusals: safety neurons that are no foundation neurons"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility", "tokenizer")
    departures: ClassVar[tuple[str, ...]] = (
        *SNTune.departures,
        "Foundation neurons are those of the utility set; the paper's are of Wikipedia.",
    )
    published: ClassVar[str] = "More of the safety survives fine-tuning on GSM8K than with SN-Tune."

    def units(self, inputs: Inputs) -> UnitSet:
        """The safety neurons that are no foundation neurons; errors as of `ssah.attribute`."""
        safety, foundation = (
            consistent_units(inputs.model, loader, self.share) for loader in inputs.loaders
        )
        return safety - foundation  # what both need would lose utility as it trains


def consistent_units(model: PreTrainedModel, loader: Loader, share: float) -> UnitSet:
    """The units that are in the top share of their module for every row.

    Raises:
        ValueError: there is no row, or as of `ssah.attribute`.
    """
    sets = []
    # Row by row: a sum over rows would let a few of them choose.
    for row in _rows(loader):
        # All tokens: what is asked counts as much as what is answered.
        found = attribute(model, [row], metric="norm", tokens="all", process_group=None)
        sets.append(highest(found.scores, share))
    if not sets:
        raise ValueError("loader is empty, must have at least one batch")
    return reduce(UnitSet.__and__, sets)


def _rows(loader: Loader) -> Iterator[Mapping[str, Any]]:
    """Batches of one row each."""
    for batch in loader:
        # What is no tensor belongs to the batch as a whole, and scoring does not read it.
        for row in range(len(batch["input_ids"])):
            yield {
                key: value[row : row + 1]
                for key, value in batch.items()
                if isinstance(value, Tensor)
            }
