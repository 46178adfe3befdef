"""One call of an operator, and what the calls are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def copied(value: Any, device: str | None = None) -> Any:
    """A copy of an argument: of a tensor with its strides and all of its storage, or of a list."""
    if isinstance(value, list):
        return [copied(v, device) for v in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().clone().to(device=device or value.device)
    copy = torch.empty(0, dtype=value.dtype, device=device or value.device)
    return copy.set_(storage, value.storage_offset(), value.shape, value.stride())


def flat(value: Any) -> list[Tensor]:
    """The tensors of an argument: one, or those of a list."""
    return [] if value is None else [value] if isinstance(value, Tensor) else [*value]


@dataclass(frozen=True)
class Sample:
    """One call: positional tensors (or lists, or None), keyword arguments, a name for the test."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def generator(*key: object) -> torch.Generator:
    """A generator whose numbers depend on ``key`` alone."""
    return torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(repr(key))))


def normal(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * 1.5 + 0.3).to(dtype)
