"""``ssah bench``: that it compares equals, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssah.attribution import METRICS
from ssah.studies.bench import CASES, run_bench
from ssah.studies.bench.settings import Settings
from ssah_kernels.schema import KERNELS

TINY = Settings(
    rows=32,
    columns=48,
    dtypes=(torch.float32, torch.bfloat16),
    rounds=2,
    layers=1,
    hidden=128,
    length=8,
    scoring_rounds=2,
    cache_bytes=0,
)


def test_every_operator_has_a_case() -> None:
    assert set(CASES) == set(KERNELS)


@pytest.mark.parametrize("op", CASES)
def test_equals_are_compared(op: str) -> None:
    """What is timed beside an operator does the same work: sums agree with the operator's state."""
    case = CASES[op]
    torch.manual_seed(0)
    arguments = case.make(40, 24, torch.float32, torch.device("cpu"))
    copies = [a.clone() for a in arguments]
    ours, plain = case.ours(*arguments), case.plain(*copies)
    for a, b in zip(arguments, copies, strict=True):
        torch.testing.assert_close(a, b)
    if isinstance(ours, torch.Tensor):
        first = plain if isinstance(plain, torch.Tensor) else plain[0]
        torch.testing.assert_close(ours, first, check_dtype=False)


def test_every_backend_that_is_there_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ssah.studies.bench.run.QUICK", TINY)
    found = run_bench(tmp_path, quick=True)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert [row["op"] for row in found["operators"]] == [*CASES, *CASES]
    for row in found["operators"]:
        assert {"eager", "reference", found["backend"]} <= set(row["seconds"])
        assert "compile" not in row["seconds"]
    assert {*METRICS, "hooks", "eager"} == set(found["attribute"]["tokens_per_second"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "GB/s" in capsys.readouterr().out
