"""Updates that are added to a model for a while, together or in part: ``attach``.

An update has the trained values t of some entries, whose values before, w, the model has. With a
factor s the model computes with

    w + s (t - w)        s = 1: t, bit for bit; s = 0: w, bit for bit; else rounded once

Example: one update made a model safer, and another one better at mathematics, on other units. Both
are attached, the second by half, and taken off again:

    with ssah.attach(model, "runs/safer", "runs/maths") as attached:
        attached.scale(0.5, "runs/maths")
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssah.interventions import check_not_ablated
from ssah.settings import check_number
from ssah.training.optimising import check_unplanned
from ssah.training.updates.merging import placed_update, read_update
from ssah.training.updates.placed import Placed

# The models that have updates attached: a second call would take the first one's values for the
# model's own. Weak, and not an attribute: a copy of the model is an ordinary model.
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(eq=False)
class _Update:
    """One update, the model's own values in its place, and by how much it is attached."""

    placed: list[Placed]
    own: list[Tensor]
    now: list[Tensor] = field(default_factory=list)

    def scaled(self, factor: float) -> list[Tensor]:
        """What the model has in these entries under ``factor``, as the head of the file says."""
        if factor in (0, 1):
            return self.own if factor == 0 else [each.values for each in self.placed]
        values = []
        for each, own in zip(self.placed, self.own, strict=True):
            # In float64, so that the result is rounded once, whatever the dtype.
            w, t = own.double(), each.values.to(own.device).double()
            values.append((w + factor * (t - w)).to(own.dtype))
            if not bool(values[-1].isfinite().all()):
                raise ValueError(
                    f"factor is {factor}, must be nearer to 0: {each.name!r} would be infinite"
                )
        return values


class Attached:
    """Updates that are in a model; made by `attach`, and a context that detaches them."""

    def __init__(self, model: nn.Module, updates: dict[str, list[Placed]]) -> None:
        self._model = model
        self._updates = {
            name: _Update(placed, [each.read() for each in placed])
            for name, placed in updates.items()
        }
        self._write(dict.fromkeys(updates, 1.0))
        self._attached = True
        _ATTACHED.add(model)

    def scale(self, factor: float, update: str | os.PathLike[str] | None = None) -> None:
        """Attach by ``factor`` instead: 1 is what was trained, 0 the model without it.

        Args:
            factor: of the change; below 0 and above 1 it goes on in a straight line.
            update: which of the updates, as it was named to `attach`; None: all of them.

        Raises:
            TypeError: the factor is no number.
            ValueError: no such update; a factor that is not finite, or makes weights infinite.
            RuntimeError: they are detached, or somebody else has written to these entries.
        """
        check_number("factor", factor)
        name = None if update is None else os.fspath(update)
        if name is not None and name not in self._updates:
            raise ValueError(
                f"update is {name!r}, must be one of those that are attached: "
                f"{', '.join(map(repr, self._updates))}"
            )
        self._check_in_place()
        self._write(dict.fromkeys(self._updates if name is None else [name], float(factor)))

    def detach(self) -> None:
        """The model has its own values again, bit for bit. Detaching twice does nothing.

        Raises:
            ValueError: the model has a plan in force, or is inside `ablate`.
            RuntimeError: somebody else has written to these entries.
        """
        if not self._attached:
            return
        self._check_in_place()
        self._write(dict.fromkeys(self._updates, 0.0))
        self._attached = False
        _ATTACHED.discard(self._model)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _write(self, factors: dict[str, float]) -> None:
        # All is computed before anything is written: an error leaves the model as it was.
        scaled = {name: self._updates[name].scaled(factor) for name, factor in factors.items()}
        for name, values in scaled.items():
            update = self._updates[name]
            update.now = values
            for each, value in zip(update.placed, values, strict=True):
                each.write(value)

    def _check_in_place(self) -> None:
        """Refuse, before anything is written, a model that is not as it was left."""
        if not self._attached:
            raise RuntimeError("the updates are detached: attach them again")
        check_unplanned(self._model)
        check_not_ablated(self._model, "for its updates to be changed")
        own = dict(self._model.named_parameters())
        for update in self._updates.values():
            for each, now in zip(update.placed, update.now, strict=True):
                # A parameter that was replaced keeps our values, and the model does not use it.
                there = own.get(each.name) is each.parameter and each.parameter.dtype == now.dtype
                if not there or not torch.equal(each.read(), now.to(each.parameter.device)):
                    raise RuntimeError(
                        f"{each.name!r} is not as the attached updates left it (it was trained, "
                        "loaded, cast or replaced since), so that it cannot be put back: load the "
                        "base model again"
                    )


def attach(model: nn.Module, *updates: str | os.PathLike[str]) -> Attached:
    """Add updates to the model that they were trained from, until they are detached.

    Several may be attached together if no two of them trained the same entry; then the model is,
    bit for bit, one in which all of these entries have their trained values.

    Args:
        model: the base model, in the dtype that it was trained in; changed in place.
        updates: folders that `UpdatePlan.save_pretrained` wrote, or ``"hf:user/name"``.

    Returns:
        a handle that can `scale` and `detach`, and detaches at the end of a ``with`` block.

    Raises:
        TypeError: no update is given.
        FileNotFoundError: a folder is not there.
        ValueError: as `load_update` says; two updates trained the same entry; the model has
            updates attached already. Nothing is changed then.
    """
    if not updates:
        raise TypeError("attach needs at least one update: attach(model, 'runs/update')")
    if model in _ATTACHED:
        raise ValueError(
            "model has updates attached already: detach them first, or attach all of them in one "
            "call, attach(model, first, second)"
        )
    names = [os.fspath(each) for each in updates]
    # Each is checked against the base model, whose frozen entries the others have not touched yet.
    read = {name: placed_update(model, read_update(name)) for name in names}
    if len(read) < len(names):
        raise ValueError(f"updates has {names}, must name each update once")
    _check_disjoint(read)
    return Attached(model, read)


def _check_disjoint(read: dict[str, list[Placed]]) -> None:
    """Refuse two updates that trained the same entry of a parameter."""
    taken: dict[str, list[tuple[str, Placed]]] = {}
    for update, placed in read.items():
        for each in placed:
            for other, before in taken.setdefault(each.name, []):
                both = _common(each, before)
                if both:
                    raise ValueError(
                        f"updates {other!r} and {update!r} both trained {each.name!r} ({both}), so "
                        "that their sum is neither: attach one of them, or train the second from "
                        "a model that has the first (load_update)"
                    )
            taken[each.name].append((update, each))


def _common(a: Placed, b: Placed) -> str:
    """What of one parameter two updates have both, in words; nothing where they are disjoint."""
    # Rows of one and columns of the other cross, however few they are.
    if a.index is None or b.index is None or a.dims != b.dims:
        return "all of it" if a.index is None and b.index is None else "in part"
    common = a.index[torch.isin(a.index, b.index)]
    return f"{len(common)} entries, {int(common[0])} for one" if len(common) else ""
