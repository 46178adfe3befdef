"""Lists of parameters for the masked operators, and how their results are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# Types of parameters and of their states.
TYPES = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
)
# Shape of the parameter, dimension of the units, and how many of them are trained (None: all).
PARAMETERS = (
    ((37,), 0, None),
    ((70,), 0, 9),
    ((33, 64), 1, None),
    ((140, 40), 0, 131),
    ((24, 333), 1, 270),
    ((6, 1024), 0, 5),
    ((5, 9), 1, 0),
    ((3, 4, 5), -1, 2),
    ((), 0, None),
)


SCALARS = ("lr", "step", "grad_scale", "clip_coef", "seed")


@dataclass
class Update:
    """The tensors of one call; ``states`` holds a list per kind of state."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    indices: list[Tensor | None]
    dims: list[int]
    compensations: list[Tensor] | None
    signed: list[Tensor] | None
    squared: list[Tensor] | None
    scalars: dict[str, Tensor] = field(default_factory=dict)

    def after(self, function: Callable[..., Any], **settings: Any) -> Update:
        """What one call of ``masked_adamw_`` or ``masked_sgd_`` makes of a copy."""
        mine = self.clone()
        function(
            mine.params,
            mine.grads,
            *(mine.states or [None]),
            mine.indices,
            mine.dims,
            *(mine.scalars.get(name) for name in SCALARS),
            mine.compensations,
            mine.signed,
            mine.squared,
            **settings,
        )
        return mine

    def clone(self) -> Update:
        def copies(tensors: list[Tensor]) -> list[Tensor]:
            return [t.clone(memory_format=torch.preserve_format) for t in tensors]

        def maybe(tensors: list[Tensor] | None) -> list[Tensor] | None:
            return None if tensors is None else copies(tensors)

        return replace(
            self,
            params=copies(self.params),
            states=[copies(s) for s in self.states],
            compensations=maybe(self.compensations),
            signed=maybe(self.signed),
            squared=maybe(self.squared),
        )


def make_update(
    dtype: torch.dtype,
    state: torch.dtype,
    n_states: int,
    *,
    noise: bool = False,
    kahan: bool = False,
    importance: bool = False,
    step: int = 3,
) -> Update:
    g = torch.Generator().manual_seed(step)

    def normal(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    u = Update([], [], [[] for _ in range(n_states)], [], [], None, None, None)
    compensations, signed, squared = [], [], []
    for shape, dim, trained in PARAMETERS:
        param = normal(shape, dtype)
        if dim == 1:  # a view: its rows do not follow one another
            param = normal((shape[0], shape[1] + 16), dtype)[:, 8:-8]
        index = None
        compact = list(shape)
        if trained is not None:
            index = torch.randperm(shape[dim], generator=g)[:trained].sort().values
            compact[dim] = trained
        size = tuple(compact)
        u.params.append(param)
        u.grads.append(normal(size, dtype, 0.1))
        for i, states in enumerate(u.states):
            first = normal(size, state, 0.1)
            states.append(first if i == 0 else first.square())
        u.indices.append(index)
        u.dims.append(dim)
        compensations.append(normal(size, dtype, 1e-3))
        for sums in (signed, squared):
            sums.append(normal((size[dim] if shape else 1,), torch.float64))
    u.compensations = compensations if kahan else None
    u.signed, u.squared = (signed, squared) if importance else (None, None)
    u.scalars = {
        "lr": torch.tensor(1e-2, dtype=torch.float64),
        "step": torch.tensor(float(step), dtype=torch.float64),
    }
    if kahan:
        u.scalars["grad_scale"] = torch.tensor(4.0, dtype=torch.float64)
        u.scalars["clip_coef"] = torch.tensor(0.7, dtype=torch.float64)
    if noise:
        u.scalars["seed"] = torch.tensor(-5_000_000_000)
    return u


# rtol, and atol relative to the largest magnitude, of a result by its own type.
CLOSE = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (2e-6, 1e-6),
    torch.bfloat16: (8e-3, 1e-6),
    torch.float16: (1e-3, 1e-4),
}


def compare_updates(actual: Update, expected: Update, before: Update) -> None:
    """Everything that was written is close, and what is frozen has the same bits."""
    for i, index in enumerate(actual.indices):
        if index is None:
            continue
        param, dim = actual.params[i], actual.dims[i]
        frozen = torch.ones(param.shape[dim], dtype=torch.bool).index_fill_(0, index, False)
        rest = frozen.nonzero().flatten()
        assert torch.equal(param.index_select(dim, rest), before.params[i].index_select(dim, rest))
    for ours, theirs in zip(_written(actual), _written(expected), strict=True):
        _close(ours, theirs, actual.params[0].dtype)


def _written(update: Update) -> list[Tensor]:
    """Parameters (with what Kahan's compensation adds to them), states, unit sums."""
    params = [p if p.dim() else p.reshape(1) for p in update.params]
    if update.compensations is not None:
        for i, (index, dim) in enumerate(zip(update.indices, update.dims, strict=True)):
            trained = params[i] if index is None else params[i].index_select(dim, index)
            rest = update.compensations[i].double().reshape(trained.shape)
            params[i] = trained.double() + rest
    states = [s for kind in update.states for s in kind]
    return [*params, *states, *(update.signed or ()), *(update.squared or ())]


def _close(actual: Tensor, expected: Tensor, params: torch.dtype) -> None:
    if expected.numel() == 0:
        return
    arithmetic = torch.float64 if params == torch.float64 else torch.float32
    exact = expected.dtype == torch.float64
    rtol, atol = CLOSE[arithmetic if exact else expected.dtype]
    if exact and params.itemsize == 2:
        rtol = 2e-5  # a parameter and its compensation: 16 digits of a bfloat16 pair
    scale = expected.double().abs().max().item()
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol * scale + 1e-12
    )
    if expected.dtype == torch.bfloat16 and expected.numel() > 1000:
        # Rounding meets float64 and float32 arithmetic: unlike only where a tie is near,
        # as sums of tenths of bfloat16 numbers often are.
        unlike = (actual != expected).double().mean().item()
        assert unlike < 1e-2, unlike
