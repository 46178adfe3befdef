"""A step of MaskedAdamW beside torch's fused AdamW, on the weights of some layers in bfloat16.

The bytes of an element that trains, parameter and gradient in bfloat16:

    state bfloat16   3 * 2 + 4 * 2 = 14
    state float32    3 * 2 + 4 * 4 = 22

(Parameter and both states are read and written, the gradient is read.)

A step of many tensors of a few hundred elements is bound by Python: the second piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.checks import serving
from benchmarks.gpu.operators import COPY, device_copy, share_of_copy
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.staged import Piece, Record
from benchmarks.shapes import Shape
from ssah_kernels import backends, timing
from ssah_kernels.optim import MaskedAdamW

FUSED, MASKED = "torch fused", "MaskedAdamW"
SHARE = 0.2  # of the rows of each parameter, where not all train
SMALL = (4, 64)  # of the tensors whose update is bound by Python
BF16 = torch.bfloat16
Options = dict[str, Any]
STOCHASTIC: Options = {"state_dtype": BF16, "rounding": "stochastic"}


def optimisers(scope: Scope, _: Record) -> Iterator[Piece]:
    for backend in serving(scope):
        yield f"{backend} step", partial(on, backend, step, scope)
        yield f"{backend} many tensors", partial(on, backend, many_tensors, scope)


def on(backend: str, measure: Callable[[Scope], dict[str, Any]], scope: Scope) -> dict[str, Any]:
    with backends.use(backend):
        return measure(scope)


def parameters(sizes: Sequence[tuple[int, ...]], device: str) -> list[torch.nn.Parameter]:
    """Random ones of these sizes, each with its gradient."""
    found = []
    for size in sizes:
        parameter = torch.nn.Parameter(torch.randn(size, dtype=BF16, device=device))
        parameter.grad = torch.randn_like(parameter)
        found.append(parameter)
    return found


def unit_major(shape: Shape) -> list[tuple[int, int]]:
    """[units, hidden] of gate, up, down and O of a layer, as a plan packs them."""
    return [(shape.intermediate, shape.hidden)] * 3 + [(shape.heads * shape.head_dim, shape.hidden)]


def step(scope: Scope) -> dict[str, Any]:
    """Seconds of a step, shares of the copy's bandwidth, and times torch's fused step."""
    shape = next(iter(scope.shapes.values()))
    params = parameters(unit_major(shape) * scope.layers, scope.device)
    total = sum(p.numel() for p in params)
    some = [
        torch.randperm(len(p), device=scope.device)[: round(SHARE * len(p))].sort().values
        for p in params
    ]
    trained = sum(len(index) * p.shape[1] for index, p in zip(some, params, strict=True))
    made = {
        FUSED: (torch.optim.AdamW(params, lr=1e-5, fused=True), 14 * total),
        MASKED: (MaskedAdamW(params, lr=1e-5, **STOCHASTIC), 14 * total),
        f"{MASKED}, float32 state": (MaskedAdamW(params, lr=1e-5), 22 * total),
        f"{MASKED}, a fifth of the rows": (
            MaskedAdamW([{"params": params, "indices": some}], lr=1e-5, **STOCHASTIC),
            14 * trained,
        ),
    }
    times = max(1, math.ceil(scope.burst / (14 * total)))
    calls = {COPY: device_copy(scope)}
    for name, (optimizer, _) in made.items():
        calls[name] = timing.repeated(optimizer.step, [()], torch.device(scope.device), times=times)
    seconds = timing.interleave(calls, repeats=scope.rounds, warmup=2)
    return {
        "elements": total,
        "seconds": {name: median(seconds[name]) / times for name in made},
        "of_copy": {
            name: share_of_copy(scope, seconds, name, times * n_bytes)
            for name, (_, n_bytes) in made.items()
        },
        "over_fused": {name: timing.ratio(seconds, name, FUSED) for name in made},
    }


def many_tensors(scope: Scope) -> dict[str, Any]:
    """Seconds of a step of many small tensors, which is Python's time, and times torch's."""
    params = parameters([SMALL] * scope.small, scope.device)
    times = 10
    made = {
        FUSED: torch.optim.AdamW(params, lr=1e-5, fused=True),
        MASKED: MaskedAdamW(params, lr=1e-5, **STOCHASTIC),
    }
    calls = {
        name: timing.repeated(optimizer.step, [()], torch.device(scope.device), times=times)
        for name, optimizer in made.items()
    }
    seconds = timing.interleave(calls, repeats=scope.rounds, warmup=2)
    return {
        "tensors": scope.small,
        "seconds": {name: median(seconds[name]) / times for name in made},
        "over_fused": {name: timing.ratio(seconds, name, FUSED) for name in made},
    }
