"""The Triton kernels: any GPU that Triton serves, and CPU tensors under TRITON_INTERPRET=1.

Importing this package needs neither Triton nor a GPU; ``kernel`` imports both.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from ... import backends

__all__ = ["interpreted", "kernel", "missing"]


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (read when a kernel is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing() -> str | None:
    """Why Triton's kernels cannot run here and how to get them; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton` (on Linux, 3.3 or newer)"
    if not interpreted() and not torch.accelerator.is_available():
        return (
            "torch sees no GPU (torch.accelerator.is_available() is False); to interpret the "
            "kernels on the CPU, slowly, set TRITON_INTERPRET=1 before Python starts"
        )
    return None


def kernel(op: str) -> Callable[..., Any]:
    """The function with the name and the arguments of ``op`` that launches its Triton kernels."""
    return getattr(importlib.import_module(f".{backends.stem(op)}", __package__), op)
