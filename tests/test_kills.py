"""``ssah attribute``, killed at random moments, as ``benchmarks/bench_kills.py`` does it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import tiny_chat
from commands import call
from test_streaming import one_thread  # noqa: F401

from benchmarks.bench_kills import Begin, measure

SEED = 5  # whose moments come late, when there is something to lose


def fork(model: Path, *more: object) -> Begin:
    """Starts the command in a child of this process, which has read Python's modules already."""

    def begin(out: Path) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                data = ("--data", "builtin:utility", "--limit", 60, "--batch-size", 4)
                call("attribute", model, *data, "--out", out, *more)
                code = 0
            finally:
                os._exit(code)
        return child

    return begin


@pytest.mark.parametrize("more", [("--save-every", 0), ("--stream",)])
def test_three_kills_change_no_bit(more: tuple[object, ...], tmp_path: Path) -> None:
    begin = fork(tiny_chat.save(tmp_path / "model"), *more)
    found = measure(begin, tmp_path, kills=3, draw=random.Random(SEED))
    assert sum(len(each["kills"]) for each in found["rounds"]) == 3
    for each in found["rounds"]:
        assert each["same_bits"]
        assert each["left_behind"] == []
