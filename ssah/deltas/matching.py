"""What training changed: the tensors of one or several tuned models beside those of their base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssah.deltas.weights import Weights, WeightsOf, open_weights


class Deltas:
    """The tensors of a base model and of models that were tuned from it, name by name.

    Attributes:
        base: the model before.
        tuned: the models after; the first one says in which files and types a result is written.
        names: of the tensors, in the order of the first tuned model's files.
    """

    def __init__(self, base: WeightsOf, tuned: Sequence[WeightsOf]) -> None:
        """Compare names and shapes; no weight is read.

        Raises:
            ValueError: there is no tuned model; models are of other shapes or names.
            TypeError, ModelError, FileNotFoundError: as of `open_weights`.
        """
        if not tuned:
            raise ValueError("tuned is empty, must have one model or more")
        called = [f"tuned[{i}]" if len(tuned) > 1 else "tuned" for i in range(len(tuned))]
        self.tuned = [open_weights(*each) for each in zip(tuned, called, strict=True)]
        # Last: a GGUF file is loaded whole, which a tuned model that is wrong need not wait for.
        self.base = open_weights(base, "base")
        first = self.tuned[0]
        for other in (self.base, *self.tuned[1:]):
            _check_matches(first, other)
        self.names = first.names

    def read(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """The tensor ``name`` of the base and of every tuned model, all of one shape ``[...]``."""
        base, *tuned = (each.read(_name_in(each, name)) for each in (self.base, *self.tuned))
        return base, tuned

    def in_float(self, name: str) -> bool:
        """Whether the tensor ``name`` holds numbers that training changes."""
        return self.tuned[0].dtype(name).is_floating_point

    def describe(self) -> dict[str, object]:
        """What the models are called, for a record."""
        return {"base": self.base.about, "tuned": [each.about for each in self.tuned]}


def _name_in(weights: Weights, name: str) -> str:
    """``name``, or the name of what it is tied to: one of two models may have untied its head."""
    return name if name in weights.shapes else weights.tied.get(name, name)


def _check_matches(first: Weights, other: Weights) -> None:
    missing = [name for name in first.names if _name_in(other, name) not in other.shapes]
    more = [name for name in other.shapes if name not in first.shapes]
    # Both ways: a tensor too many is as much a sign of another model as one too few.
    for lacking, having, names in ((other, first, missing), (first, other, more)):
        if names:
            raise ValueError(
                f"{lacking.about!r} lacks {len(names)} tensors that {having.about!r} has, "
                f"{names[0]!r} for one: they are of two models. If files were written by two "
                "releases, or one is in memory, load it and write it anew with save_pretrained"
            )
    for name in first.names:
        # After the names, since another architecture says more by what it lacks.
        here, there = first.shapes[name], other.shapes[_name_in(other, name)]
        if here != there:
            raise ValueError(
                f"the tensor {name!r} is {list(here)} in {first.about!r} and {list(there)} in "
                f"{other.about!r}: they must be of one model, with one vocabulary"
            )
