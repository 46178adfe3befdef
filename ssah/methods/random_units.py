"""Random units are frozen: the trivial method that every choice of units has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ssah.methods.drawing import seed_of
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Trained
from ssah.settings import setting
from ssah.units import UnitSet, find_modules, share_count


@dataclass(frozen=True)
class RandomFreezing(Method):
    """Freeze random units of each module."""

    name: ClassVar[str] = "random-freezing"
    paper: ClassVar[str] = "none: a control"
    equation: ClassVar[str] = "frozen: floor(share n + 0.5) of a module's n units, uniformly"
    stage: ClassVar[Stage] = "during"
    needs: ClassVar[tuple[Need, ...]] = ("aligned",)
    against: ClassVar[str] = "Another draw: it shows how much the draw matters."
    published: ClassVar[str] = "Nothing published."

    share: float = setting(0.075, "Share of the units of each module.", above=0, below=1)
    seed: int = setting(0, "Of the draw.", min=0)

    def _find(self, inputs: Inputs) -> Trained:
        sizes = {name: module.n_units for name, module in find_modules(inputs.model).items()}
        # Each module as much, as the controls of other methods have it.
        first = {name: range(share_count(self.share, n)) for name, n in sizes.items()}
        like = UnitSet(first, sizes)
        units = UnitSet.random(like, seed=self.seed)
        return Trained(
            units,
            # Mixed with the method's own seed: of equal seeds both would be one draw.
            draw=lambda seed: UnitSet.random(like, seed=seed_of(seed, f"not {self.seed}")),
            facts={"units": len(units)},
        )
