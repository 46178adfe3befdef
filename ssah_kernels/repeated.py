"""Calls that are as an earlier one was, whose checks need not be made again.

A step of an optimiser calls an operator with the lists of the step before: the same parameters,
states and indices, and new gradients of the same shapes. To check 450 parameters one by one takes
longer than to update them. So what the checks found is kept, with what they found it of:

    lists     the same tensors, by identity, each as it lay in memory; indices as they were
    grads     shapes, one dtype, device and layout, contiguous, and apart from what is written
    numbers   looked at in every call: lr, step and the like

Whatever differs is checked from the beginning, by ``checks``, ``memory`` and ``indices``: a call
that they would refuse is never one that is known here. What is kept is gone with any state or index
of it; it holds none of these tensors.

How tensors lie is compared by the CPU library (``csrc/cpu/placement.cpp``), of any device. An
installation without it checks every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import overlap
from .backends import cpu
from .checks.matrices import as_matrix
from .checks.updates import scalar_like
from .schema import arguments

_MOST = 256  # calls that may come again; a model has a few
Key: TypeAlias = tuple[int, int]  # id of the first parameter, and how many there are


@dataclass(frozen=True)
class _Known:
    """One call that was checked, see the top of this file."""

    options: Mapping[str, Any]  # all that is no tensor and no list: momentum, for one
    ids: list[int]  # of all tensors in lists but gradients
    placement: Tensor  # int64 [words]: of what is written, of the indices, and of the gradients
    versions: list[int]  # of the indices
    dims: list[int]
    stretches: Tensor  # int64 [2, n]: where memory that is written begins and ends, sorted
    axes: list[int]
    views: dict[int, list[int]]  # argument -> its tensors that are no matrices as they are
    alive: list[weakref.ref[Tensor]]  # of states and indices: each forgets the call as it goes


class Repeated:
    """The calls of one update operator that are known.

    Args:
        op: the operator.
        tensors_of: from its arguments to the tensors that it writes and those it reads beside.
    """

    def __init__(
        self, op: str, tensors_of: Callable[[Sequence[Any]], tuple[list[Tensor], list[Tensor]]]
    ) -> None:
        listed = [(i, kind, name) for i, (kind, name) in enumerate(arguments(op))]
        at = {name: i for i, _, name in listed}
        self._tensors_of = tensors_of
        self._grads, self._indices, self._dims = at["grads"], at["indices"], at["dims"]
        tensors = [(i, kind, name) for i, kind, name in listed if kind.startswith("Tensor")]
        self._lists = [i for i, kind, _ in tensors if "[]" in kind]
        self._numbers = [(i, name) for i, kind, name in tensors if "[]" not in kind]
        self._arity = 1 + max(i for i, _, _ in tensors)
        self._known: dict[Key, _Known] = {}
        self._seen: dict[Key, list[int]] = {}

    def ready(
        self,
        args: Sequence[Any],
        options: Mapping[str, Any],
        written: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> tuple[Any, ...] | None:
        """The arguments as a kernel takes them, if the call is known; else None.

        Args:
            args: tensors, lists of them, and dims.
            options: all other arguments.
            written, grads: those of ``args`` that are written, and that are read beside.
        """
        if not args[0]:
            return None
        known = self._known.get((id(args[0][0]), len(args[0])))
        if known is None or options != known.options or args[self._dims] != known.dims:
            return None
        if self._ids(args) != known.ids:
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in written):
            return None
        if not torch.is_inference_mode_enabled() and any(x.is_inference() for x in args[0]):
            return None
        indices = [x for x in args[self._indices] if x is not None]
        # Whatever is assigned to ``data`` has the id and the version of what was there.
        if not torch.ops.ssah_cpu.is_placed.default(
            [*written, *indices], grads, known.placement, known.stretches
        ):
            return None
        if [x._version for x in indices] != known.versions:
            return None
        ready = [*args, *[None] * (self._arity - len(args))]
        for i, odd in known.views.items():
            ready[i] = list(args[i])
            for k in odd:
                ready[i][k] = as_matrix(args[i][k], known.dims[k])
        ready[self._dims] = known.axes
        for i, name in self._numbers:
            dtype = torch.int64 if name == "seed" else torch.float64
            ready[i] = scalar_like(name, ready[i], args[0][0], dtype)
        return tuple(ready)

    def learn(self, args: Sequence[Any], options: Mapping[str, Any], ready: Sequence[Any]) -> None:
        """Remember a call that was checked, and of which ``ready`` was made, once it came twice."""
        if cpu.missing() is not None:
            return
        key = id(args[0][0]), len(args[0])
        ids = self._ids(args)
        if self._seen.get(key) != ids:
            if len(self._seen) >= _MOST:
                self._seen.clear()
            self._seen[key] = ids
            return
        written, grads = self._tensors_of(args)
        indices = [x for x in args[self._indices] if x is not None]
        fixed = [x for i in self._lists if i != self._grads for x in self._list(args, i)]
        views = self._views(args, ready)
        # Tensors of inference mode have no version, and other gradients are copied in every call.
        odd = any(x.is_inference() for x in fixed if x is not None)
        if views is None or odd or not all(g.is_contiguous() for g in grads):
            return

        def forget(_: object) -> None:
            self._known.pop(key, None)

        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = _Known(
            options,
            ids,
            torch.ops.ssah_cpu.placement.default([*written, *indices], grads),
            [x._version for x in indices],
            list(args[self._dims]),
            torch.tensor(overlap.stretches(written)),
            ready[self._dims],
            views,
            # torch swaps no tensor that has a weak reference, and parameters may be swapped.
            [weakref.ref(x, forget) for x in fixed[len(args[0]) :] if x is not None],
        )

    def _list(self, args: Sequence[Any], i: int) -> Sequence[Any]:
        return args[i] if i < len(args) and args[i] is not None else ()

    def _ids(self, args: Sequence[Any]) -> list[int]:
        """Of all tensors in lists but gradients, which are new in every step."""
        ids: list[int] = []
        for i in self._lists:
            if i != self._grads:
                ids += map(id, self._list(args, i))
                ids.append(i)  # where a list ends: one may be left out
        return ids

    def _views(self, args: Sequence[Any], ready: Sequence[Any]) -> dict[int, list[int]] | None:
        """Which tensors a kernel takes as views; None if it takes a copy of one."""
        views: dict[int, list[int]] = {}
        for i in self._lists:
            for k, (x, taken) in enumerate(zip(self._list(args, i), ready[i] or (), strict=True)):
                if taken is x:
                    continue
                if taken.data_ptr() != x.data_ptr() or taken.numel() != x.numel():
                    return None
                views.setdefault(i, []).append(k)
        return views
