"""What an evaluation takes out, by name: ``DIR:GROUP[:SHARE][:random]``, or a selection.

For example, ``runs/groups:scu`` is all SCU of that folder, ``runs/groups:scu:0.008`` those that are
most like SCU, as many as 0.8 % of all units, and ``runs/groups:scu:random`` as many random units.
``heads:2.26`` is one attention head (`ssah.selections.selectors`), and ``heads:2.26:random`` is one
of its layer, drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssah.groups import GROUPS, UnitGroups, share_of
from ssah.selections import Selection, check_named, is_selector, names_groups, select
from ssah.storage import HUB
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ablation:
    """What to take out, as ``DIR:GROUP[:SHARE][:random]`` or ``SELECTION[:random]`` names it.

    Attributes:
        folder: what ``ssah classify`` saved.
        group: one of its groups.
        random: as many random units of every module as there are of these, in their place.
        share: those of the group that are most like it, as many as this fraction of all units:
            `UnitGroups.top` by ``"group"``. None: all of the group.
        selection: text such as ``"heads:2.26"``, in place of a folder and a group.
    """

    folder: str
    group: str
    random: bool = False
    share: float | None = None
    selection: str | None = None

    @classmethod
    def parse(cls, text: str) -> Ablation:
        """Read a name, and check that the folder has such a group, and so many units of it.

        Raises:
            ValueError: the name has another form, or there is no such group or share of it.
            FileNotFoundError: the folder has no groups.
        """
        random = text.endswith(":random")
        if is_selector(text) and text.partition(":")[0] not in GROUPS:
            return cls._selecting(text.removesuffix(":random"), random)
        # From the right, because a path may have colons of its own.
        folder, _, group = text.removesuffix(":random").rpartition(":")
        before, _, inner = folder.rpartition(":")
        share = None
        if before and inner in GROUPS:  # DIR:GROUP:SHARE, and not a folder with a colon in its name
            folder, group, share = before, inner, share_of(f"ablate is {text!r}", group)
        if not folder or not group or f"{folder}:" == HUB:
            raise ValueError(
                f"ablate is {text!r}, must be 'DIR:GROUP', 'DIR:GROUP:SHARE', or a selection "
                "such as 'heads:2.26', or one of these with ':random' after it"
            )
        # Without a model, so that a wrong name is refused before one is loaded.
        groups = UnitGroups.load(folder)
        if group not in groups:
            raise ValueError(
                f"ablate is {text!r}: {folder!r} has no group {group!r}, it has {', '.join(groups)}"
            )
        found = cls(folder, group, random, share)
        if share is not None and not len(found._taken(groups)):
            raise ValueError(f"ablate is {text!r}: that share has no unit, it must be larger")
        return found

    @classmethod
    def _selecting(cls, text: str, random: bool) -> Ablation:
        if names_groups([text]):
            raise ValueError(
                f"ablate is {text!r}, which joins a group with something else; it must be a group "
                "alone, 'DIR:GROUP', or the selection must be saved and given as 'weights:DIR'"
            )
        check_named([text], None)
        return cls("", text.partition(":")[0], random, selection=text)

    def __str__(self) -> str:
        if self.selection is not None:
            return self.selection + (":random" if self.random else "")
        share = "" if self.share is None else f":{self.share}"
        return f"{self.folder}:{self.group}{share}" + (":random" if self.random else "")

    @property
    def source(self) -> str:
        """Where it is from."""
        return self.folder if self.selection is None else self.selection

    def chosen(self, model: PreTrainedModel, seed: int) -> UnitSet | Selection:
        """The units or the selection, checked against the model."""
        if self.selection is not None:
            selection = select(model, self.selection)
            return Selection.random(selection, seed=seed) if self.random else selection
        found = self._taken(UnitGroups.load(self.folder, model))
        return UnitSet.random(found, seed=seed) if self.random else found

    def _taken(self, groups: UnitGroups) -> UnitSet:
        if self.share is None:
            return groups[self.group]
        return groups.top(self.group, self.share, by="group")


@dataclass(frozen=True)
class Evaluated:
    """A model that is evaluated: as it is, or with units taken out.

    Attributes:
        name: of its steps.
        ablated: as :class:`Ablation` has it, or ``"nothing"``.
        chosen: taken out; None: nothing.
        units: those that put nothing out: of a selection, with its columns of B.
    """

    name: str
    ablated: str = "nothing"
    chosen: UnitSet | Selection | None = None
    units: UnitSet | None = None
