"""What the figures depend on: versions, the device, and which backends serve it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.staged import Piece, Record
from ssah_kernels import backends

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "numpy", "ninja")


def info(scope: Scope, _: Record) -> Iterator[Piece]:
    """Versions, the device, and which backends serve it."""
    yield "machine", lambda: {**common.facts(), "cpus": os.cpu_count(), **device(scope)}
    yield "versions", lambda: {name: version(name) for name in PACKAGES}
    # "" for one that serves.
    yield "backends", lambda: {name: backends.missing(name) or "" for name in scope.backends}


def device(scope: Scope) -> dict[str, Any]:
    """The GPU's name, memory, compute capability and driver."""
    if scope.device == "cpu":
        return {"device": "CPU (dry run)"}
    found = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": found.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{found.major}.{found.minor}",
        "memory": found.total_memory,
        "cache": found.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": driver.stdout.split("\n")[0],
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
