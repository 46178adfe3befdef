"""Calls of the compiled libraries' own operators: of what they leak, and which they must refuse."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import CASES
from samples import Sample, copied
from torch import Tensor

from ssah_kernels import checks

F64, F32 = torch.float64, torch.float32


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def heap_in_use() -> int:
    """Bytes that C has allocated and not freed."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    facts = mallinfo()
    return facts.uordblks + facts.hblkhd


def leaked(call: Callable[[], object], calls: int = 1000) -> int:
    """Bytes that the heap grows by in ``calls`` calls, once everything that is kept is there."""
    for _ in range(20):
        call()
    before = heap_in_use()
    for _ in range(calls):
        call()
    return heap_in_use() - before


def call_of(op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one small call, ready for a kernel."""
    sample: Sample = next(
        s for s in CASES[op].samples(F32) if s.name.startswith(("(2, 3)", "131-1"))
    )
    args = getattr(checks, op)(*(copied(a) for a in sample.args), **sample.kwargs)
    return args, sample.kwargs


def replaced(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


def wrong(op: str) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Calls of a kernel that must be refused, each with one argument that is wrong."""
    args, kwargs = call_of(op)
    number = {"act": checks.ACTIVATIONS.index(kwargs["act"])} if "act" in kwargs else {**kwargs}
    for i, value in enumerate(args):
        listed = value if isinstance(value, list) else [value]
        which = [n for n, entry in enumerate(listed) if isinstance(entry, Tensor)]
        if isinstance(value, list):  # an entry that has two elements to lose or to part
            which = [n for n in which if listed[n].numel() > 1]
        if not which:
            continue
        for name, change in (
            ("another dtype", lambda t: t.to(F64 if t.dtype == F32 else F32)),
            ("integers", lambda t: t.int()),
            ("one element fewer", lambda t: t.reshape(-1)[:-1]),
            ("strided", lambda t: torch.stack([t, t], -1)[..., 0]),
            (
                "no dimension",
                lambda t: t.flatten()[:1].view(()) if t.dim() else t.view(1, 1).half(),
            ),
        ):
            of_matrix = op.startswith("masked") and i == 0 and name == "strided"
            alone = op == "masked_grad_norm" or not op.startswith("masked")
            one_input = op in ("channel_moments_", "column_sq_norms", "masked_grad_norm") and i == 0
            if of_matrix or (one_input and name == "another dtype" and alone):
                continue  # as good as any
            if (op, i, name) == ("masked_grad_norm", 1, "one element fewer"):
                continue  # selects one fewer
            changed = change(listed[which[-1]])
            if isinstance(value, list):
                changed = [*value[: which[-1]], changed, *value[which[-1] + 1 :]]
            if (
                isinstance(value, Tensor)
                and value.numel() == 1
                and name in ("strided", "no dimension")
            ):
                continue
            if isinstance(value, Tensor) and value.numel() == 1 and name == "one element fewer":
                changed = value.new_zeros(2)
            yield f"argument {i}: {name}", replaced(args, i, changed), number
    for i, value in enumerate(args):
        if isinstance(value, list):
            yield f"argument {i}: empty", replaced(args, i, []), number
            yield f"argument {i}: one entry fewer", replaced(args, i, value[:-1]), number
    if "act" in number:
        for act in (-1, 5, 2**40):
            yield f"act {act}", args, {"act": act}
    if op == "gated_product":
        for arm in (-1, 10**9):
            yield f"arm {arm}", replaced(args, 3, torch.full_like(args[3], arm)), number
    if op.startswith("masked"):
        at = 2 if op == "masked_grad_norm" else 5 if op == "masked_adamw_" else 4
        yield "dims of 2", replaced(args, at, [2] * len(args[at])), number
        index = [torch.tensor([10**9])] * len(args[at])
        yield "index beyond", replaced(args, at - 1, index), number
        yield "index of floats", replaced(args, at - 1, [i.double() for i in index]), number
        yield "index of two dimensions", replaced(args, at - 1, [i[None] for i in index]), number
    if op == "bit_masked_adamw_":
        for name, change in (
            ("falling", lambda t: t.flip(0)),
            ("not from 0", lambda t: t + 1),
            ("far", lambda t: t + 2**62 * (t > 0)),
            ("more than a block has", lambda t: t * 2048),
        ):
            yield f"offsets {name}", replaced(args, 5, [change(t) for t in args[5]]), number
        yield "state of float16", replaced(args, 2, [t.half() for t in args[2]]), number
    if op in ("masked_adamw_", "masked_sgd_"):
        yield (
            "squared without signed",
            replaced(args, 13 if op == "masked_adamw_" else 12, None),
            number,
        )
        state = [t.half() for t in args[2]]
        yield "state of float16", replaced(args, 2, state), number


def outcomes(op: str, call: Callable[..., Any]) -> dict[str, str]:
    """Per wrong call, what came of it."""
    found = {}
    for name, args, kwargs in wrong(op):
        try:
            call(*args, **kwargs)
            found[name] = "accepted"
        except RuntimeError as error:
            found[name] = f"refused: {str(error).splitlines()[0]}"
    return found
