"""An operator in every backend that is there, beside PyTorch: gigabytes per second and ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssah.studies.bench.cases import Case
from ssah.studies.bench.settings import Settings
from ssah_kernels import backends, timing


def measure_op(
    case: Case, settings: Settings, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """One row: gigabytes per second of every implementation, and ratios of time."""
    shape = (settings.rows, settings.columns)
    with torch.no_grad():  # derivatives have a case of their own
        inputs, n_bytes = inputs_of(case, shape, dtype, device, settings.cache_bytes)
        functions = implementations(case, _usable(device), compiled)
        calls = {
            name: timing.repeated(function, inputs, device) for name, function in functions.items()
        }
        times = timing.interleave(calls, repeats=settings.rounds, warmup=1)
    chosen = backends.choose(device)
    seconds = {name: timing.percentiles(values) for name, values in times.items()}
    return {
        "op": case.op,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": n_bytes,
        "seconds": seconds,
        "gigabytes_per_second": {name: n_bytes / s["p50"] / 1e9 for name, s in seconds.items()},
        "faster_than": {
            name: timing.ratio(times, name, chosen) for name in times if name != chosen
        },
    }


def inputs_of(
    case: Case,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    cache_bytes: int,
) -> tuple[list[tuple[Any, ...]], int]:
    """Arguments of both functions, enough of them that no cache answers; bytes that a call moves.

    ``shape`` is [rows, columns] of the case's inputs.
    """
    torch.manual_seed(0)
    first = case.make(*shape, dtype, device)[0]  # the masked operators' gradient is compact
    n_bytes = case.tensors * first.numel() * first.element_size()
    return timing.rotating(lambda: case.make(*shape, dtype, device), n_bytes, cache_bytes), n_bytes


def implementations(
    case: Case, names: Sequence[str], compiled: bool
) -> dict[str, Callable[..., Any]]:
    """The operator in each backend of ``names``, the same in PyTorch, and that one compiled."""

    def on(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> None:
            with backends.use(name):
                case.ours(*args)

        return run

    found = {name: on(name) for name in names}
    found["eager"] = case.plain
    if compiled:
        found["compile"] = torch.compile(case.plain, dynamic=False)
    return found


def _usable(device: torch.device) -> list[str]:
    """Backends that run on tensors of this device, the one that serves them first."""
    chosen = backends.choose(device)
    served = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}.get(device.type, ["triton"])
    names = [chosen, *served, "reference"]  # the chosen one may be among those that follow
    return [name for name in dict.fromkeys(names) if backends.missing(name) is None]
