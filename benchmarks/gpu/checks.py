"""Whether every operator is right on the device, and touches no memory that is not its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.scope import CAPTURED, SAMPLES, SECOND_DEVICE, SIDE_STREAM, Scope
from benchmarks.gpu.staged import Piece, Record
from ssah_kernels import backends
from ssah_kernels.optim import MaskedAdamW, MaskedSGD
from ssah_kernels.schema import KERNELS

Check = Callable[[str], None]
ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]

import on_device  # noqa: E402
from cases import CASES, check_backend  # noqa: E402


def serving(scope: Scope) -> list[str]:
    """The backends that serve the device here, the preferred one first.

    Raises:
        RuntimeError: there is none.
    """
    why = {name: backends.missing(name) for name in scope.backends}
    found = [name for name in scope.backends if why[name] is None]
    if not found:
        raise RuntimeError(f"no backend serves {scope.device}: {why}")
    return found


def correctness(scope: Scope, _: Record) -> Iterator[Piece]:
    """Operators on streams and in graphs, optimisers and scores; then all cases of the operators.

    In this order, because Triton compiles a kernel for almost every case, which may take too long.
    """
    ops, serve = scope.checked or tuple(KERNELS), serving(scope)
    check: Check
    for backend in serve:
        for op in ops:
            for name, each in on_streams(scope, op).items():
                yield f"{backend} {op} {name}", partial(asserted, each, backend)
        for optimizer in (MaskedAdamW, MaskedSGD):
            name = f"{backend} {optimizer.__name__}"
            for rounding in ("nearest", "stochastic", "remainder"):
                check = partial(on_device.check_optimizer, optimizer, rounding, backend)
                yield f"{name} {rounding}", partial(asserted, check, scope.device)
            check = partial(on_device.check_steps_wait_for_nothing, optimizer)
            yield f"{name} without waiting", partial(asserted, on_gpu(scope, check), backend)
        for metric in ("variance", "norm", "taylor", "fisher"):
            check = partial(on_device.check_attribution, metric, backend)
            yield f"{backend} attribute {metric}", partial(asserted, check, scope.device)
        check = partial(on_device.check_batches_wait_for_nothing, "variance")
        yield (
            f"{backend} attribute without waiting",
            partial(asserted, on_gpu(scope, check), backend),
        )
    for which in SAMPLES:
        for backend in serve:
            for op in ops:
                yield f"{backend} {op} {which}", partial(compared, scope, backend, op, which)


def compared(scope: Scope, backend: str, op: str, which: str) -> dict[str, Any]:
    """How many calls were compared; AssertionError from the first that differs."""
    number = check_backend(
        CASES[op],
        on_device.moved(op, backend, scope.device),
        backends.kernel("reference", op),
        dtypes=tuple(getattr(torch, name) for name in scope.dtypes),
        which=which,
    )
    return {"compared": number}


def on_streams(scope: Scope, op: str) -> dict[str, Check | str]:
    """What a GPU can do besides: a check of a backend, or why there is none."""
    second = partial(on_device.check_second_device, op)
    graph = partial(on_device.check_captured, op)
    many, captures = torch.cuda.device_count() > 1, on_device.capturable(op)
    return {
        SIDE_STREAM: on_gpu(scope, partial(on_device.check_side_stream, op)),
        SECOND_DEVICE: on_gpu(scope, second) if many else "one CUDA device, or none",
        CAPTURED: on_gpu(scope, graph) if captures else "it says that no CUDA graph can hold it",
    }


def on_gpu(scope: Scope, check: Check) -> Check | str:
    """A check that needs a GPU, or why there is none."""
    return check if scope.device == "cuda" else "no CUDA device"


def asserted(check: Check | str, argument: str) -> dict[str, Any]:
    """That a check passed, or why it was skipped."""
    if isinstance(check, str):
        return {"skipped": check}
    check(argument)
    return {"compared": 1}


def sanitizer(scope: Scope, _: Record) -> Iterator[Piece]:
    """One large call of every operator under compute-sanitizer, where there is one."""
    for backend in serving(scope):
        yield f"{backend} memcheck", partial(memcheck, scope, backend)


def memcheck(scope: Scope, backend: str) -> dict[str, Any]:
    """What compute-sanitizer sums up; RuntimeError with the end of its report if it has one."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    tool = shutil.which("compute-sanitizer") or shutil.which(home / "bin" / "compute-sanitizer")
    if tool is None:
        return {"skipped": "there is no compute-sanitizer on the PATH or in CUDA_HOME"}
    own = ["-m", "benchmarks.gpu.one_call", scope.device, backend, str(scope.wide)]
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, *own],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        # Memory of its own for each tensor: what runs over its end is then seen.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"status {done.returncode}: {done.stdout.strip()[-1500:]}")
    return {"report": done.stdout.strip().splitlines()[-1]}
