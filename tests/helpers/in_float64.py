"""Models in float64 throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["InFloat64"]


class InFloat64(TorchFunctionMode):
    """Inside the block, whatever asks for float32 gets float64.

    Norms, routers and softmaxes of transformers compute in float32, whatever a model is in. Two
    orders of a sum that differ by 1e-16 are rounded there to numbers that differ by 1e-7, of which
    a gradient that cancels keeps up to 1.4e-4 of its size. In float64 it keeps 3e-12.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wider, args), **named)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
