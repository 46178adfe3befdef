"""Two processes that save to one folder, and one that reads there."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from ssah.storage import META, load_tensors, save_tensors, sealed

TIMES = 100


def _save(folder: Path, start: Any, mark: int) -> None:
    for n in range(TIMES):
        start.wait(timeout=60)
        save_tensors(folder / str(n), {"x": torch.full((9,), float(mark))}, {"mark": mark})


def test_two_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # of what is imported; no kernel runs in there
    start = context.Barrier(2)
    writers = [context.Process(target=_save, args=(tmp_path, start, mark)) for mark in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    for n in range(TIMES):
        tensors, meta = load_tensors(tmp_path / str(n))
        assert tensors["x"].tolist() == [float(meta["mark"])] * 9
        assert len(list((tmp_path / str(n)).iterdir())) == 2  # no strays


def _alternate(folder: Path, stop: Any) -> None:
    n = 0
    while not stop.is_set():
        n += 1
        save_tensors(folder, {"x": torch.full((9,), float(n))}, {"mark": n})


def test_a_reader_beside_a_writer_sees_one_result_or_the_other(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"x": torch.zeros(9)}, {"mark": 0})
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=_alternate, args=(tmp_path, stop))
    writer.start()
    seen = set()
    try:
        while len(seen) < 30:
            tensors, meta = load_tensors(tmp_path)
            assert tensors["x"].tolist() == [float(meta["mark"])] * 9
            seen.add(meta["mark"])
    finally:
        stop.set()
        writer.join(timeout=60)
    assert writer.exitcode == 0


def test_a_result_cannot_name_tensors_outside_its_folder(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": torch.zeros(2)}, {})
    save_tensors(tmp_path / "b", {"x": torch.ones(2)}, {})
    meta = json.loads((tmp_path / "b" / META).read_text())
    del meta["meta_sha256"]
    meta["tensors"] = f"../b/{meta['tensors']}"
    (tmp_path / "a" / META).write_bytes(sealed(meta, "meta_sha256"))
    with pytest.raises(ValueError, match="outside its folder"):
        load_tensors(tmp_path / "a")
