"""``ssah attribute``, killed at random moments, as ``benchmarks/bench_kills.py`` does it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.bench_kills import WAYS, fork, measure

SEED = 5  # whose moments come late, when there is something to lose


@pytest.mark.parametrize("way", WAYS)
def test_three_kills_change_no_bit(way: str, tiny_chat_folder: Path, tmp_path: Path) -> None:
    begin = fork(way, tiny_chat_folder, tmp_path / "log")
    found = measure(begin, tmp_path, kills=3, draw=random.Random(SEED))
    assert sum(len(each["kills"]) for each in found["rounds"]) == 3
    for each in found["rounds"]:
        assert each["same_bits"]
        assert each["left_behind"] == []
