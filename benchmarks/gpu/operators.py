"""How much of the bandwidth of a device copy the operators reach, beside what they replace.

The share of an operator is (its bytes / its time) / (the copy's bytes / the copy's time): of 470 MB
that are read in 0.12 ms, where a copy moves 4.3 TB/s, 0.91. Both are measured in the same rounds.
A time is that of many calls over rotating inputs, as one CUDA graph where all that is compared can
be captured, which the stage before has found out.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.checks import serving
from benchmarks.gpu.scope import CAPTURED, Scope
from benchmarks.gpu.staged import Piece, Record
from benchmarks.shapes import Shape
from ssah.studies.bench import CASES
from ssah.studies.bench.operators import implementations, inputs_of
from ssah_kernels import timing

OF_WEIGHTS = {"column_sq_norms", "masked_adamw_", "bit_masked_adamw_", "masked_sgd_"}
OF_WEIGHTS |= {"masked_grad_norm"}
COPY = "copy"


def operators(scope: Scope, record: Record) -> Iterator[Piece]:
    """All at every model's sizes; then, as compiling takes seconds each, at the first one's."""
    for model in scope.shapes:
        yield from at_sizes(scope, record, model, compiled=False)
    if scope.compiled:
        yield from at_sizes(scope, record, next(iter(scope.shapes)), compiled=True)


def at_sizes(scope: Scope, record: Record, model: str, *, compiled: bool) -> Iterator[Piece]:
    """Activations of every number of tokens (the first alone if compiled), and weights once."""
    for tokens in scope.tokens[:1] if compiled else scope.tokens:
        for op in CASES:
            if op in OF_WEIGHTS and tokens != scope.tokens[0]:
                continue
            of = "weights" if op in OF_WEIGHTS else f"{tokens} tokens"
            name = f"{op}, {model}, {of}" + (", compiled" if compiled else "")
            captured = captures(scope, record, op)
            size = shape_of(op, scope.shapes[model], tokens)
            yield name, partial(measure, scope, op, size, captured, compiled)


def shape_of(op: str, shape: Shape, tokens: int) -> tuple[int, int]:
    """[rows, columns] of an operator's inputs: of down for norms, of gate for updates."""
    if op == "column_sq_norms":
        return shape.hidden, shape.intermediate
    return (shape.intermediate, shape.hidden) if op in OF_WEIGHTS else (tokens, shape.intermediate)


def captures(scope: Scope, record: Record, op: str) -> bool:
    """Whether every backend's graph of the operator was right."""
    done = record["stages"].get("correctness", {}).get("done", {})
    return all("compared" in done.get(f"{b} {op} {CAPTURED}", {}) for b in serving(scope))


def measure(
    scope: Scope, op: str, shape: tuple[int, int], captured: bool, compiled: bool
) -> dict[str, Any]:
    """Seconds a call, shares of the copy's bandwidth, and how often faster the first backend is."""
    device, names = torch.device(scope.device), serving(scope)
    with torch.no_grad():
        inputs, n_bytes = inputs_of(CASES[op], shape, torch.bfloat16, device, scope.cache)
        functions = implementations(CASES[op], names, compiled)
        if op == "gated_moments" and scope.device == "cuda":
            functions |= liger()
        times = max(len(inputs), math.ceil(scope.burst / n_bytes))
        calls = {COPY: device_copy(scope)}
        calls |= {
            name: timing.repeated(function, inputs, device, times=times, captured=captured)
            for name, function in functions.items()
        }
        seconds = timing.interleave(calls, repeats=scope.rounds, warmup=1)
    return {
        "shape": list(shape),
        "bytes": n_bytes,
        "captured": captured,
        "seconds": {name: median(seconds[name]) / times for name in functions},
        "of_copy": {
            name: share_of_copy(scope, seconds, name, times * n_bytes) for name in functions
        },
        "faster_than": {
            name: timing.ratio(seconds, name, names[0]) for name in functions if name != names[0]
        },
    }


def device_copy(scope: Scope) -> Callable[[int], None]:
    """A call that copies ``scope.copied`` bytes, which it reads and writes, ``copies`` times."""
    source = torch.ones(scope.copied, dtype=torch.uint8, device=scope.device)
    pair = (torch.empty_like(source), source)
    return timing.repeated(Tensor.copy_, [pair], source.device, times=copies(scope))


def copies(scope: Scope) -> int:
    return math.ceil(scope.burst / (2 * scope.copied))


def share_of_copy(
    scope: Scope, seconds: Mapping[str, Sequence[float]], name: str, n_bytes: float
) -> float:
    """Of the copy's bandwidth, what a call that moves ``n_bytes`` reached in the same rounds."""
    return timing.ratio(seconds, COPY, name) * n_bytes / (2 * scope.copied * copies(scope))


def liger() -> dict[str, Callable[..., Any]]:
    """Liger's product of gate and up, without moments, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {"liger": LigerSiLUMulFunction.apply}
