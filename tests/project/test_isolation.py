"""What one test does to its process, the next one does not see."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import tiny_models
import torch
from isolation import active_plans, process_as_it_was
from plans import draw

from ssah.training import freeze


def test_a_test_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEFT", "before")
    before = state()
    seed(1)
    expected = torch.rand(1), random.random()
    seed(1)
    with process_as_it_was():
        model = tiny_models.build("llama")
        freeze(model, draw(model))
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        os.environ |= {"LEFT": "after", "NEW": "after"}
        os.chdir(tmp_path)
        seed(2)
        assert state() != before
        (plan,) = (each for each in active_plans() if each.model is model)
    assert state() == before
    assert (torch.rand(1), random.random()) == expected
    assert plan not in active_plans()


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)


def state() -> tuple[object, ...]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    return threads, dtype, dict(os.environ), Path.cwd(), list(active_plans())


def test_a_test_begins_with_one_thread() -> None:
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"
