"""Drawn calls of the CPU kernels against the reference, as many as asked for.

    PYTHONPATH=.:tests:tests/kernels:tests/helpers python runs/drawn_calls.py CALLS [THREADS]

The calls are those of tests/kernels/test_drawn_ops.py, of every operator in turn and from one seed
on. With THREADS each thread draws its share, and all call the kernels at the same time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from cases import CASES, check_sample
from test_drawn_ops import Draw, up_to_rounding

from ssah_kernels import backends, checks
from ssah_kernels.checks import matrices
from ssah_kernels.schema import KERNELS


def checked(backend: str, op: str) -> Callable[..., Any]:
    """The operator on one backend. ``backends.use`` would change it for all threads."""
    check, kernel = getattr(checks, op), backends.kernel(backend, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        return matrices.run(op, kernel, check(*args, **kwargs), kwargs)

    return call


def compare(numbers: range) -> None:
    """The drawn calls of these numbers."""
    for number in numbers:
        op = KERNELS[number % len(KERNELS)]
        try:
            sample = Draw(number).call(op)
            case = up_to_rounding(CASES[op])
            check_sample(case, checked("cpu", op), checked("reference", op), sample)
        except Exception as error:
            raise AssertionError(f"draw {number} of {op}: {error}") from error


def main(calls: int, threads: int = 1) -> None:
    torch.set_num_threads(1)
    failed: list[BaseException] = []

    def share(first: int) -> None:
        try:
            compare(range(first, calls, threads))
        except AssertionError as error:
            failed.append(error)

    workers = [threading.Thread(target=share, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    print(f"{calls} drawn calls in {threads} thread{'s' * (threads > 1)}: as the reference")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
