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

from ssah_kernels import backends
from ssah_kernels.backends import cpu


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
