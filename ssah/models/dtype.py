"""In which dtype this machine multiplies matrices faster."""

from __future__ import annotations

import functools
import math
import time

import torch


@functools.cache
def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where this machine multiplies matrices faster in it than in float32.

    This is measured once a process, so that all of its runs choose alike.
    """
    if device.type != "cpu":  # only the processor is measured
        return torch.bfloat16
    seconds, limit = {}, math.inf
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
        times: list[float] = []
        # The fastest of a few: others may have had the processor meanwhile.
        while len(times) < 8 and sum(times) < limit:
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
        limit = 8 * sum(times)  # a processor without bfloat16 takes a second for each product
    return min(seconds, key=lambda dtype: seconds[dtype])
