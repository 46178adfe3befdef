"""SN-Tune: units that write much at every harmful request are trained, and nothing else.

Zhao et al., ICLR 2025. What unit j writes at token t is x_j(t) B[:, j]. Its importance for one
request is how much hidden states change without it,

    I_j(q) = mean over tokens t of q of |x_j(t) B[:, j]|^2

    safety neurons       in the top share of their module for every harmful request
    foundation neurons   the same over ordinary instructions
    SN-Tune              the safety neurons train;  RSN-Tune: those that are no foundation neurons

Example of one module with a share of one half: request 1 has I = (4, 3, 1, 0), request 2 has (3, 0,
9, 1). The halves are {0, 1} and {0, 2}, and the safety neuron is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ssah.attribution import attribute
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Loader, Need
from ssah.methods.outcomes import Trained
from ssah.methods.ranking import highest
from ssah.settings import setting
from ssah.units import UnitSet

_PAPER = "Zhao et al., Safety Mechanisms of LLMs via Safety-Specific Neurons, ICLR 2025"


@dataclass(frozen=True)
class SNTune(Method):
    """Train what writes at every request."""

    name: ClassVar[str] = "sn-tune"
    paper: ClassVar[str] = _PAPER
    equation: ClassVar[str] = "trained: intersection over requests of the top units of each module"
    stage: ClassVar[Stage] = "during"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety")
    departures: ClassVar[tuple[str, ...]] = (
        "The units train on whatever the fine-tune has; the paper trains them on refusals, before "
        "any task, and its figures are of that.",
        "Tokens of refusals count beside those of requests, where the rows have them.",
        "Units are channels of FFNs and of values; rows of queries and keys do not count.",
        "The paper does not say how many units a request has; the default share is ours.",
        "Nothing else moves, bit for bit; in ports of the method decay and momentum move more.",
    )
    against: ClassVar[str] = "As many random units of each module."
    published: ClassVar[str] = "Harmful score 65.5 -> 2.0 (Llama-3-8B-Instruct), under 1 % trained."

    share: float = setting(0.05, "Of a module's units, for one request.", above=0, max=1)

    def units(self, inputs: Inputs) -> UnitSet:
        """The safety neurons; errors as of `ssah.attribute`."""
        assert inputs.safety is not None
        return consistent_units(inputs.model, inputs.safety, self.share)

    def _find(self, inputs: Inputs) -> Trained:
        units = self.units(inputs)
        # A plan refuses this too, but cannot say which setting made it so.
        if not len(units):
            raise ValueError(
                f"share is {self.share}, and no unit is in it for every request; raise it, or use "
                "fewer rows"
            )
        return Trained(units, alone=True, facts={"units": len(units)})


@dataclass(frozen=True)
class RSNTune(SNTune):
    """Train those of harmful requests alone."""

    name: ClassVar[str] = "rsn-tune"
    equation: ClassVar[str] = "trained: safety neurons that are no foundation neurons"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility")
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
