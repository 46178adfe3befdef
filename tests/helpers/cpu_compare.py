"""Compare the CPU kernels with the reference; `cpu_compare.py` prints how many calls it compared.

`cpu_compare.py all` compares calls of every type and at the ends of the range; `cpu_compare.py
some` those of bfloat16.

A process of its own, because the instruction set is chosen once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from cases import CASES, check_backend

from ssah_kernels import backends


def on(backend: str, op: str) -> Callable[..., Any]:
    """``torch.ops.ssah.<op>`` on one backend."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with backends.use(backend):
            return getattr(torch.ops.ssah, op)(*args, **kwargs)

    return call


def compare(op: str, which: str = "samples", **options: Any) -> int:
    return check_backend(CASES[op], on("cpu", op), on("reference", op), which=which, **options)


if __name__ == "__main__":
    if sys.argv[1] == "all":
        print(sum(compare(op) + compare(op, "extreme") for op in CASES))
    else:
        print(sum(compare(op, dtypes=(torch.bfloat16,)) for op in CASES))
