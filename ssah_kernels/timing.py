"""Timing that holds on a noisy machine: interleaved calls, rotating inputs, percentiles, facts.

A figure is a ratio between calls of one run on one machine: absolute times wander, ratios of
interleaved calls do not.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import backends
from .backends import cpu


def interleave(
    calls: Mapping[str, Callable[[int], Any]], repeats: int = 15, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn: A B C A B C ... Each gets the number of the round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    # In turn, so that what slows the machine for a second slows every call alike.
    for i in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            elapsed = time.perf_counter() - start
            if i >= warmup:
                times[name].append(elapsed)
    return times


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """Median over rounds of time a / time b."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    # Not the smallest and the largest: one interruption would decide them.
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def rotating(make: Callable[[], Any], bytes_each: int, cache_bytes: int = 64 << 20) -> list[Any]:
    """Enough copies of an input that a cache of ``cache_bytes`` holds none when its turn comes."""
    # Twice the cache, because what was read last may stay while the rest goes by.
    return [make() for _ in range(max(2, -(-2 * cache_bytes // max(bytes_each, 1))))]


def repeated(
    function: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    device: torch.device,
    *,
    times: int = 1,
    captured: bool = False,
) -> Callable[[int], None]:
    """A call for ``interleave``: ``function`` that often, on ``inputs`` in turn, and a wait for the
    device, since a GPU has only begun when a call returns.

    Args:
        times: calls in one go. On a GPU some milliseconds of them: starting and waiting take
            20 us, which would be a tenth of a kernel of 0.2 ms.
        captured: as one CUDA graph, so that Python does not slow the kernels down.
    """

    def run(i: int) -> None:
        for k in range(i * times, (i + 1) * times):
            function(*inputs[k % len(inputs)])

    start = _graph(run, device) if captured else run

    def run_and_wait(i: int) -> None:
        start(i)
        wait(device)

    return run_and_wait


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _graph(run: Callable[[int], None], device: torch.device) -> Callable[[int], None]:
    """A call that replays what ``run`` starts on the GPU."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run(0)  # what is compiled or made once must not be part of the graph
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0)
    return lambda _: graph.replay()


def read_bandwidth(n_bytes: int = 256 << 20) -> Callable[[int], Any]:
    """A call that only reads ``n_bytes`` of memory, on torch's threads (needs the extension)."""
    read_bytes = backends.kernel("cpu", "read_bytes")
    buffer = torch.ones(n_bytes, dtype=torch.uint8)
    return lambda _: read_bytes(buffer)


def facts() -> dict[str, Any]:
    """What a figure depends on: versions, threads, processor, instruction set."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        **cpu.facts(),
    }
