"""Registers the catalogue as ``torch.ops.ssah.*``: schema, dispatch, fakes and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ssah_kernels import autograd, backends, checks, fake, memory
from ssah_kernels.schema import SCHEMAS

_lib = torch.library.Library("ssah", "DEF")


def _dispatch(op: str) -> Callable[..., Any]:
    check = getattr(checks, op)
    tensors_of = memory.reader(op)

    def run(*args: Any, **kwargs: Any) -> Any:
        ready = check(*args, **kwargs)
        written, _ = tensors_of(args)
        memory.check(op, args, written)
        first = ready[0] if isinstance(ready[0], Tensor) else ready[0][0]
        with torch.no_grad():
            backend = backends.choose(first.device)
            result = backends.kernel(backend, op, first.device)(*ready, **kwargs)
        # Autograd then knows that what it kept of these tensors is gone.
        increment_version(written)
        return result

    return run


def register() -> None:
    for op, schema in SCHEMAS.items():
        # A graph of CUDA would keep the addresses of an update's lists, which are gone by then.
        unsafe = [torch.Tag.cudagraph_unsafe] if op.startswith("masked") else []
        _lib.define(op + schema, tags=[torch.Tag.pt2_compliant_tag, *unsafe])
        _lib.impl(op, _dispatch(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ssah::{op}", getattr(fake, op), lib=_lib)
    autograd.register(_lib)


register()
