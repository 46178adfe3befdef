"""Registers the catalogue as ``torch.ops.ssah.*``: schema, dispatch, fakes and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssah_kernels import autograd, backends, checks, fake
from ssah_kernels.schema import KERNELS, SCHEMAS

_lib = torch.library.Library("ssah", "DEF")


def _dispatch(op: str) -> Callable[..., Any]:
    check = getattr(checks, op)

    def run(*args: Any, **kwargs: Any) -> Any:
        ready = check(*args, **kwargs)
        first = ready[0] if isinstance(ready[0], Tensor) else ready[0][0]
        with torch.no_grad():
            backend = backends.choose(first.device)
            return backends.kernel(backend, op, first.device)(*ready, **kwargs)

    return run


def register() -> None:
    for op, schema in SCHEMAS.items():
        # These copy a table to the GPU in every call, which no CUDA graph can (torch.compile).
        tags = (torch.Tag.cudagraph_unsafe,) if op.startswith("masked_") else ()
        _lib.define(op + schema, tags=tags)
        function = _dispatch(op) if op in KERNELS else getattr(autograd, op)
        _lib.impl(op, function, "CompositeExplicitAutograd")
        if op.endswith("_"):  # returns nothing to differentiate; its state must not join the graph
            _lib.impl(op, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"ssah::{op}", getattr(fake, op), lib=_lib)
    autograd.register(_lib)


register()
