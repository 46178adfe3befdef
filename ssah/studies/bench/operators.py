"""An operator in every backend that is there, beside PyTorch: gigabytes per second and ratios."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ssah.studies.bench.cases import Case
from ssah.studies.bench.settings import Settings
from ssah_kernels import backends, timing


def measure_op(
    case: Case, settings: Settings, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """One row: gigabytes per second of every implementation, and ratios of time."""
    torch.manual_seed(0)
    shape = settings.rows, settings.columns
    first = case.make(*shape, dtype, device)[0]  # the masked operators' gradient is compact
    n_bytes = case.tensors * first.numel() * first.element_size()
    inputs = timing.rotating(
        lambda: case.make(*shape, dtype, device), n_bytes, settings.cache_bytes
    )

    def timed(function: Callable[..., Any], backend: str | None = None) -> Callable[[int], None]:
        def run(i: int) -> None:
            with ExitStack() as stack:
                if backend is not None:
                    stack.enter_context(backends.use(backend))
                function(*inputs[i % len(inputs)])
                synchronize(device)  # a GPU has only begun when the call returns

        return run

    calls = {name: timed(case.ours, name) for name in _usable(device)}
    calls["eager"] = timed(case.plain)
    if compiled:
        calls["compile"] = timed(torch.compile(case.plain, dynamic=False))
    with torch.no_grad():  # derivatives have a case of their own
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


def _usable(device: torch.device) -> list[str]:
    """Backends that run on tensors of this device, the one that serves them first."""
    chosen = backends.choose(device)
    served = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}.get(device.type, ["triton"])
    names = [chosen, *served, "reference"]  # the chosen one may be among those that follow
    return [name for name in dict.fromkeys(names) if backends.missing(name) is None]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
