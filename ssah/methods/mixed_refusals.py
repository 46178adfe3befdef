"""Refusals are mixed into the batches of a fine-tune: the trivial method that others have to beat.

Bianchi et al., ICLR 2024, arXiv 2309.07875, mix harmful requests with refusals into instructions.
Of n rows trained on, ceil(share n) are refusals, spread evenly over the batches: in batches of 8, a
share of 0.1 makes it 1, 1, 1, 1, 0, 1, ... rows of a batch.

**The control** has ordinary answers in the places of the refusals: as many rows, and as little of
the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ssah.data import Encoded, mixed
from ssah.methods.added_rows import with_added_rows
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Procedure, RowOrder
from ssah.settings import setting


@dataclass(frozen=True)
class MixedRefusals(Method):
    """Mix refusals into the batches."""

    name: ClassVar[str] = "mixed-refusals"
    paper: ClassVar[str] = "Bianchi et al., Safety-Tuned LLaMAs, ICLR 2024, arXiv 2309.07875"
    equation: ClassVar[str] = "of n rows trained on, ceil(share n) are refusals"
    stage: ClassVar[Stage] = "during"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility")
    departures: ClassVar[tuple[str, ...]] = (
        "Refusals take the places of rows of the task; the paper adds 100 to 2,000 of them to "
        "20,000 instructions.",
        "The model is aligned already; the paper's is not.",
    )
    against: ClassVar[str] = "As many ordinary answers in the same places."
    published: ClassVar[str] = "A few per cent of refusals make a model safer; many overdo it."
    strength: ClassVar[str | None] = "share"
    strengths: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1)

    share: float = setting(0.1, "Share of refusals among the rows of training.", above=0, below=1)

    def _find(self, inputs: Inputs) -> Procedure:
        return with_added_rows(inputs, self._order, share=self.share)

    def _order(self, added: list[Encoded]) -> RowOrder:
        def order(task: Sequence[Encoded], batch_size: int, steps: int, seed: int) -> list[Encoded]:
            return mixed(task, added, self.share, batch_size, steps, seed)

        return order
