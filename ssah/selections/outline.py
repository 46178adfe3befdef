"""What of a model a selection is over: its parameters, their shapes, and whose units they are."""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import dataclass

from torch import nn

from ssah.models import packed_modules
from ssah.units import features, model_name, units_hash


@dataclass(frozen=True, eq=False)
class Outline:
    """The parameters of one model.

    Attributes:
        shapes: name in ``model.named_parameters()`` -> shape. Of tied ones the first name; a packed
            weight has the shape that it stands for.
        units_hash: of the model (`ssah.units.units_hash`).
        model_name: hub id, path or class of the model.
        reference: a weak reference to the model, or None.
    """

    shapes: dict[str, tuple[int, ...]]
    units_hash: str
    model_name: str
    reference: weakref.ref[nn.Module] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Outline:
        """That of ``model``.

        Raises:
            TypeError, ValueError: `find_modules` does not know the model, or a plan is in force.
        """
        hashed = units_hash(model)  # first: it refuses what is no whole model
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        # Packed, a weight is stored in another shape: what is meant is the one that it stands for.
        for name in packed_modules(model):
            inputs, outputs = features(model.get_submodule(name))
            shapes[f"{name}.weight"] = (outputs, inputs)
        return cls(shapes, hashed, model_name(model), weakref.ref(model))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of units, names and shapes: equal where a selection fits."""
        text = json.dumps([self.units_hash, sorted(self.shapes.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def model(self) -> nn.Module:
        """The model itself.

        Raises:
            ValueError: it is not known, or no longer there.
        """
        found = None if self.reference is None else self.reference()
        if found is None:
            raise ValueError(
                f"the model of this selection ({self.model_name!r}) is not at hand, which must say "
                "what its units, heads and layers are: load the selection with model=, or use "
                "selection.of(model)"
            )
        return found

    def check(self, other: Outline, what: str) -> None:
        """Refuse another model's.

        Args:
            other: that which must fit.
            what: what it is, for the message: ``"the model"``.

        Raises:
            ValueError: parameters, their shapes or the units differ; the models and the first
                parameter that differs are named.
        """
        if other is self or (other.units_hash, other.shapes) == (self.units_hash, self.shapes):
            return
        both = [*self.shapes, *other.shapes]
        differ = [name for name in both if self.shapes.get(name) != other.shapes.get(name)]
        how = "other units"
        if differ:
            shapes = [
                f"{list(each.shapes[differ[0]])} in {each.model_name!r}"
                if differ[0] in each.shapes
                else f"no parameter of {each.model_name!r}"
                for each in (self, other)
            ]
            how = f"{differ[0]!r} is {shapes[0]} and {shapes[1]}"
        raise ValueError(
            f"the selection is of {self.model_name!r}, and {what} is {other.model_name!r}: {how}; "
            "both must be of the same model"
        )
