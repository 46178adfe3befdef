"""What a method finds on a model, computed when a step needs it, and forgotten after its row.

What is found holds whole models and cannot be kept in a folder. A run that goes on therefore finds
it anew, once, where a step of the method is still to be done.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

from ssah.interventions import Zero
from ssah.methods import Changed, Inputs, Outcome, Trained
from ssah.selections import Selection, units
from ssah.studies.compare.measuring import peak_memory
from ssah.units import UnitSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from ssah.studies.compare.lineup import Entrant


@dataclass
class Finding:
    """What one method finds.

    Attributes:
        entrant: the method.
        inputs: gives what it needs, with the model fine-tuned by a seed where it needs one.
        aligned: gives the aligned model.
    """

    entrant: Entrant
    inputs: Callable[[Entrant, int | None], Inputs]
    aligned: Callable[[], PreTrainedModel]
    _given: dict[int | None, Inputs] = field(default_factory=dict)
    _kept: dict[tuple[int | None, float | None], Outcome] = field(default_factory=dict)

    def outcome(self, seed: int | None, strength: float | None = None) -> Outcome:
        """What is found beside the fine-tune of a seed, at a strength; None: the default.

        Errors as of `Method.find`.
        """
        key = (seed, strength)
        if key not in self._kept:
            own = self.entrant.method
            if strength is not None:
                assert own.strength is not None
                own = replace(own, **{own.strength: strength})
            # One at a time, and the last one goes first: each may hold a model.
            self._kept.clear()
            if seed not in self._given:  # its models are read from disk
                self._given.clear()
                self._given[seed] = self.inputs(self.entrant, seed)
            self._kept[key] = own.find(self._given[seed])
        return self._kept[key]

    def look(self, seed: int | None, control: int) -> dict[str, Any]:
        """Find it for the first time, for a step: what a row says of it.

        Returns:
            ``seconds``, ``peak_memory_bytes``, ``facts``, ``share`` of all parameters (None where
            it is no part of them), ``refused``: why the method can do nothing with this model and
            data, ``taken_out``: whether it zeroes a part and changes nothing else, and
            ``no_control``: why there is no other part of the size; None where there is.
        """
        with peak_memory() as peak:
            start = time.perf_counter()
            found, refused = attempt(lambda: self.outcome(seed))
            told: dict[str, Any] = {
                "seconds": time.perf_counter() - start,
                "peak_memory_bytes": peak(),
                "refused": refused,
            }
        if found is None:
            return {**told, "facts": {}, "share": None, "taken_out": False, "no_control": None}
        _, no_control = attempt(lambda: found.control(control))
        return {
            **told,
            "facts": dict(found.facts),
            "share": share_of(found, self.aligned()),
            "taken_out": taken_out(found) is not None,
            "no_control": no_control,
        }


def attempt(find: Callable[[], Outcome]) -> tuple[Outcome | None, str | None]:
    """What is found, or why the method refuses: it then has a row that says so.

    On a model of two layers, for example, all may be safety layers, and no other run of as many is
    left. The other methods can be compared all the same.
    """
    try:
        return find(), None
    except ValueError as error:
        return None, str(error)


def taken_out(found: Outcome) -> UnitSet | Selection | None:
    """The part that is zero while the model runs, where nothing else changes."""
    changes = found.changes if isinstance(found, Changed) else ()
    if len(changes) == 1 and isinstance(changes[0], Zero):
        part = changes[0].selection
        return part if isinstance(part, UnitSet | Selection) else None
    return None


def share_of(found: Outcome, model: PreTrainedModel) -> float | None:
    """The fraction of all parameters that is frozen, trained alone or changed; None: no part."""
    if isinstance(found, Trained):
        parts: list[object] = [found.selection]
    elif isinstance(found, Changed):
        # Directions of hidden states are no part of the parameters.
        parts = [getattr(change, "selection", None) for change in found.changes]
    else:
        return None
    chosen = [part for part in parts if isinstance(part, UnitSet | Selection)]
    if not parts or len(chosen) < len(parts):
        return None
    # A row of V that several units read is frozen with any of them, and trains with all alone.
    shared: Literal["any", "all"] = (
        "any" if isinstance(found, Trained) and not found.alone else "all"
    )
    each = (
        part if isinstance(part, Selection) else units(model, part, shared=shared)
        for part in chosen
    )
    return reduce(Selection.__or__, each).fraction
