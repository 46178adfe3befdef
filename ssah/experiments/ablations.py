"""Which units an evaluation takes out, by name: ``DIR:GROUP`` and what may follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssah.groups import UnitGroups
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Ablation", "Arm"]


@dataclass(frozen=True)
class Ablation:
    """Units to take out, as ``DIR:GROUP`` or ``DIR:GROUP:random`` names them.

    Attributes:
        folder: what ``ssah classify`` saved.
        group: one of its groups.
        random: as many random units of every module as the group has there, in its place.
    """

    folder: str
    group: str
    random: bool = False

    @classmethod
    def parse(cls, text: str) -> Ablation:
        """Read a name, and check that the folder has such a group.

        Raises:
            ValueError: the name has another form, or there is no such group.
            FileNotFoundError: the folder has no groups.
        """
        path, _, last = text.rpartition(":")
        random = last == "random" and ":" in path
        if random:
            path, _, last = path.rpartition(":")
        if not path or not last:
            raise ValueError(f"ablate is {text!r}, must be 'DIR:GROUP' or 'DIR:GROUP:random'")
        groups = UnitGroups.load(path)
        if last not in groups:
            raise ValueError(
                f"ablate is {text!r}: {path!r} has no group {last!r}, it has {', '.join(groups)}"
            )
        return cls(path, last, random)

    def __str__(self) -> str:
        return f"{self.folder}:{self.group}" + (":random" if self.random else "")

    def units(self, model: PreTrainedModel, seed: int) -> UnitSet:
        """The units, checked against the model."""
        found = UnitGroups.load(self.folder, model)[self.group]
        return UnitSet.random(found, seed=seed) if self.random else found


@dataclass(frozen=True)
class Arm:
    """A model to evaluate: as it is, or with units taken out.

    Attributes:
        name: of its steps.
        ablated: as :class:`Ablation` has it, or ``"nothing"``.
        units: taken out.
    """

    name: str
    ablated: str = "nothing"
    units: UnitSet | None = None
