"""Lisa: refusals and the task take turns, and each is pulled to what the other one has left.

Huang et al., NeurIPS 2024, arXiv 2405.18641. In turn, with a the weights at the end of the other's
last turn, which are those at the beginning of this one:

    min over w of   L_safety(w) + rho / 2 |w - a|^2     for some updates
    min over w of   L_task(w)   + rho / 2 |w - a|^2     for some more

With turns of 1 and 9 updates, update 0 has refusals alone, 1 to 9 the task, 10 refusals, and so on.
There is no pull in the first tenth of the updates.

**The control** has ordinary answers in the place of refusals, with the same turns and pull.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ssah.data import Encoded, in_turns
from ssah.methods.added_rows import with_added_rows
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Procedure, RowOrder
from ssah.settings import setting
from ssah.training import ProximalCallback


@dataclass(frozen=True)
class Lisa(Method):
    """Alternate refusals and the task."""

    name: ClassVar[str] = "lisa"
    paper: ClassVar[str] = "Huang et al., Lisa, NeurIPS 2024, arXiv 2405.18641"
    equation: ClassVar[str] = "in turns: L_safety or L_task, + rho / 2 |w - a|^2"
    stage: ClassVar[Stage] = "during"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility")
    departures: ClassVar[tuple[str, ...]] = (
        "Turns are a hundredth of the published 100 and 900 updates, for short fine-tunes; `scale` "
        "says how long they are.",
        "The first tenth, which has no pull, is of the most updates that a run may take; one that "
        "stops at a training loss takes fewer.",
        "After a turn of refusals the task goes on where it was; the published code leaves out as "
        "many of its rows as the turn had.",
        "The whole model trains; the published scripts train LoRA adapters.",
    )
    against: ClassVar[str] = "The same turns and pull, with ordinary answers for refusals."
    published: ClassVar[str] = "Fewer harmful answers after harmful fine-tuning; the task stays."
    strength: ClassVar[str | None] = "rho"
    strengths: ClassVar[tuple[float, ...]] = (0.1, 1.0, 10.0)

    rho: float = setting(1.0, "How strong the pull is.", min=0)
    safety_updates: int = setting(100, "Updates of a turn of refusals, before scaling.", min=1)
    task_updates: int = setting(900, "Updates of a turn of the task, before scaling.", min=1)
    scale: float = setting(0.01, "What both are multiplied by; each is 1 at least.", above=0)
    start: float = setting(0.1, "Share of the updates without a pull.", min=0, max=1)

    @property
    def turns(self) -> tuple[int, int]:
        """How many updates a turn of refusals has, and one of the task."""
        first, second = (
            max(1, round(self.scale * n)) for n in (self.safety_updates, self.task_updates)
        )
        return first, second

    def _find(self, inputs: Inputs) -> Procedure:
        first, second = self.turns

        def turns_begin(step: int) -> bool:
            return step % (first + second) in (0, first)

        return with_added_rows(
            inputs,
            self._order,
            # A new one for each training: it keeps the weights of one model.
            lambda: (ProximalCallback(self.rho, turns_begin, self.start),),
            turns=[first, second],
            rho=self.rho,
        )

    def _order(self, added: list[Encoded]) -> RowOrder:
        def order(task: Sequence[Encoded], batch_size: int, steps: int, seed: int) -> list[Encoded]:
            return in_turns((added, task), self.turns, batch_size, steps, seed)

        return order
