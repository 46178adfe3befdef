"""Registers the catalogue as ``torch.ops.ssah.*``: schema, dispatch, fakes and derivatives.

A call goes through these, from the top: the derivative (``autograd``), the checks of arguments
(``checks``), of memory (``memory``) and of the values of indices and masks (``indices``,
``bit_masks``), and then one kernel of the backend that serves the device. All checks come first, so
that what raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import autograd, backends, bit_masks, checks, fake, indices, memory
from .checks import matrices
from .repeated import Repeated
from .schema import NAMESPACE, SCHEMAS, arguments

_lib = torch.library.Library(NAMESPACE, "DEF")


def _dispatch(op: str) -> Callable[..., Any]:
    check = getattr(checks, op)
    tensors_of = memory.reader(op)
    names = [name for _, name in arguments(op)]
    at = names.index("indices") if "indices" in names else None
    arm_at = names.index("arm") if "arm" in names else None
    masked = ("params", "masks", "offsets", "exp_avgs") if "masks" in names else ()
    masked_at = [names.index(name) for name in masked]
    of_lists = at is not None or bool(masked)
    repeated = Repeated(op, tensors_of) if {"params", "indices"} <= set(names) else None

    def check_all(args: Any, kwargs: Any, written: list[Tensor], read: list[Tensor]) -> Any:
        """The arguments as a kernel takes them. Raises where they must not be taken."""
        ready = check(*args, **kwargs)
        memory.check(op, args, written, read)
        if at is not None:
            indices.check(args[at], args[0], args[at + 1])
        if masked_at:
            bit_masks.check(*(args[i] for i in masked_at))
        if arm_at is not None:
            indices.check_arms(args[arm_at], len(args[arm_at - 1]))
        if repeated is not None:
            repeated.learn(args, kwargs, ready)
        return ready

    def run(*args: Any, **kwargs: Any) -> Any:
        written, read = tensors_of(args)
        ready = None if repeated is None else repeated.ready(args, kwargs, written, read)
        if ready is None:
            ready = check_all(args, kwargs, written, read)
        first = args[0][0] if of_lists else args[0]  # of a list, all are on one device
        backend = backends.choose(first.device)
        kernel = backends.kernel(backend, op, first.device)
        # The reference is made of torch's operators, which would record what they do.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            result = matrices.run(op, kernel, ready, kwargs)
        increment_version(written)  # what autograd kept of these tensors is gone
        return result

    return run


def register() -> None:
    for op, schema in SCHEMAS.items():
        # These copy a table to the GPU in every call, or read arms from it, which no CUDA graph can
        # (torch.compile).
        waits = "masked" in op or op == "gated_product"
        unsafe = [torch.Tag.cudagraph_unsafe] if waits else []
        _lib.define(op + schema, tags=[torch.Tag.pt2_compliant_tag, *unsafe])
        _lib.impl(op, _dispatch(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op}", getattr(fake, op), lib=_lib)
    autograd.register(_lib)


register()
