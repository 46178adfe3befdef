"""Scores of models in folders, their comparison to the bit, and processes killed at a write."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import build, collate, rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from ssah.attribution import Attribution, attribute

Batches = list[dict[str, Tensor]]


def batches(side: str = "right") -> Batches:
    return [collate(part, side=side) for part in (rows(), rows((6, 10, 3, 10), seed=1))]


def saved(folder: Path, name: str = "llama", **options: Any) -> str:
    """The folder of the family's tiny model, whose layers are in shards of their own."""
    model = build(name, dtype=options.pop("dtype", torch.float32))
    model.save_pretrained(folder, **options)
    return str(folder)


def in_memory(folder: str, data: Batches, **options: Any) -> Attribution:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return attribute(model.eval(), data, **options)


def assert_same(actual: Attribution, expected: Attribution) -> None:
    """To the bit, and in everything that is recorded about them."""
    for kind in ("scores", "mean", "variance"):
        ours, theirs = getattr(actual, kind), getattr(expected, kind)
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), f"{kind} of {name}"
    for kind in ("count", "metric", "tokens", "model_name", "units_hash", "data_fingerprint"):
        assert getattr(actual, kind) == getattr(expected, kind), kind


def dying(nth: int, run: Callable[[], Any]) -> bool:
    """Whether a child that is killed in the middle of its nth write did not get to its end."""
    child = os.fork()
    if child == 0:
        count = 0

        def write(path: Path, content: bytes) -> None:
            nonlocal count
            count += 1
            with path.open("wb") as file:
                file.write(content[: len(content) // 2] if count == nth else content)
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            Path.write_bytes = write  # type: ignore[assignment, method-assign]
            run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def spoil(path: Path, *, cut: bool) -> None:
    """Cut a file off in the middle, or change a bit there."""
    content = path.read_bytes()
    middle = len(content) // 2
    rest = b"" if cut else bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(content[:middle] + rest)
