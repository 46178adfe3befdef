"""runs/gpu.sh: its stages, what it leaves, and all of it on the CPU (``--dry-run``)."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_device
import pytest
import torch
from pages import ROOT

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, installing, operators
from benchmarks.gpu.page import page
from benchmarks.gpu.scope import DRY
from benchmarks.gpu.staged import Piece, Record, Stage, Stages, in_fork
from benchmarks.gpu.targets import TARGETS
from ssah_kernels import timing
from ssah_kernels.schema import KERNELS

FACTS = {"dry_run": False, "commit": "abc", "torch": "2.11.0", "python": "3.12.3"}


def of(pieces: dict[str, Callable[[], dict[str, Any]]]) -> Callable[[Record], Iterator[Piece]]:
    return lambda _: iter(pieces.items())


def test_a_stage_goes_on_after_a_failure_and_a_rerun_does_what_is_missing(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def counted(name: str) -> dict[str, Any]:
        with calls.open("a") as file:
            file.write(f"{name}\n")
        return {"name": name}

    broken: dict[str, Callable[[], dict[str, Any]]] = {
        "raises": lambda: {"value": 1 / 0},
        "dies": lambda: os.kill(os.getpid(), signal.SIGKILL) or {},
        "no number": lambda: {"value": math.nan},
    }
    whole = {name: lambda name=name: counted(name) for name in ("first", "last", *broken)}
    first = {"first": whole["first"], **broken, "last": whole["last"]}
    path = tmp_path / "record.json"
    Stages(path, FACTS).run([Stage("a", 60, of(first)), Stage("b", 1, of(whole))])
    kept = json.loads(path.read_text())["stages"]
    assert kept["a"]["status"] == "failed"
    assert kept["a"]["done"] == {name: {"name": name} for name in ("first", "last")}
    failed = kept["a"]["failed"]
    assert list(failed) == list(broken)
    assert failed["raises"] == "ZeroDivisionError: division by zero"
    assert failed["dies"] == f"its process ended with status {int(signal.SIGKILL)}"
    assert failed["no number"].startswith("ValueError: Out of range float values")
    assert kept["b"]["status"] == "done"

    calls.unlink()
    again = Stages(path, FACTS)
    again.run([Stage("a", 60, of(whole)), Stage("b", 1, of(whole))])
    assert calls.read_text().splitlines() == [*broken]  # b and the rest were done
    assert again.record["stages"]["a"]["status"] == "done"
    assert not again.record["stages"]["a"]["failed"]
    with pytest.raises(ValueError, match="give another folder, or delete the file"):
        Stages(path, {**FACTS, "commit": "def"})


def test_a_stage_over_its_time_is_killed_and_what_it_did_is_kept(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def slow() -> dict[str, Any]:
        child = subprocess.Popen(["sleep", "60"])
        started.write_text(str(child.pid))
        child.wait()
        return {}

    def listing(record: Record) -> Iterator[Piece]:
        yield "sees", lambda: {"stages": sorted(record["stages"])}
        raise RuntimeError("no more")

    own = Stages(tmp_path / "record.json", FACTS)
    between = []
    own.run(
        [
            Stage("slow", 1, of({"quick": lambda: {"x": 1}, "slow": slow, "never": dict})),
            Stage("next", 60, listing),
        ],
        lambda: between.append(len(own.record["stages"])),
    )
    assert between == [1, 2]
    kept = own.record["stages"]
    assert (kept["slow"]["status"], kept["slow"]["done"]) == ("out of time", {"quick": {"x": 1}})
    assert 1 <= kept["slow"]["seconds"] < 20
    assert kept["next"]["done"] == {"sees": {"stages": ["next", "slow"]}}
    assert list(kept["next"]["failed"].values()) == ["RuntimeError: no more"]
    child = Path("/proc", started.read_text())
    for _ in range(100):  # what a stage started is killed with it: gone, or waiting to be reaped
        if not child.exists() or ") Z " in (child / "stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the stage started is still running")


def test_a_fork_gives_back_what_it_found() -> None:
    assert in_fork(lambda: os.getppid()) == os.getpid()
    with pytest.raises(RuntimeError, match="status 3"):
        in_fork(lambda: os._exit(3))


def a_wheel(root: Path) -> None:
    (root / "dist").mkdir()
    with zipfile.ZipFile(
        root / "dist" / "ssah_kernels-0.2-cp310-abi3-linux_x86_64.whl", "w"
    ) as wheel:
        wheel.writestr("ssah_kernels/_C_cuda.abi3.so", "library")
        wheel.writestr("ssah_kernels/ops.py", "not this")


@pytest.mark.parametrize(
    ("serves", "wheel", "how"),
    [
        ([True], True, "they were there"),
        ([False, True], True, "from ssah_kernels-0.2-cp310-abi3-linux_x86_64.whl"),
        ([False, False, True], True, "built here"),
        ([False, True], False, "built here"),
        ([False, False], False, "Triton alone"),
    ],
)
def test_the_libraries_come_from_where_they_are(
    serves: list[bool], wheel: bool, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``serves``: whether the CUDA library works, each time that it is asked."""
    from benchmarks.gpu.scope import FULL

    asked, built = iter(serves), []
    monkeypatch.setattr(
        installing,
        "unusable",
        lambda backend: None if backend == "triton" or next(asked) else "no nvcc",
    )
    monkeypatch.setattr(installing, "build", lambda root: built.append(root) or "the log")
    if wheel:
        a_wheel(tmp_path)
    found = installing.libraries(FULL, tmp_path)
    assert found["how"] == how
    assert built == ([tmp_path] if how in ("built here", "Triton alone") else [])
    unpacked = [str(path.relative_to(tmp_path)) for path in tmp_path.glob("ssah_kernels/*")]
    assert unpacked == (["ssah_kernels/_C_cuda.abi3.so"] if wheel and len(serves) > 1 else [])
    if how == "Triton alone":
        assert found["why"] == "no nvcc"


def test_libraries_that_do_not_work_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installing.unusable("reference") is None
    monkeypatch.setattr(installing, "unusable", lambda backend: f"no {backend}")
    monkeypatch.setattr(installing, "build", lambda root: "the log")
    with pytest.raises(RuntimeError, match="no cpu; the build ended with: the log"):
        installing.libraries(DRY, Path("no such folder"))


def test_a_wrong_result_on_the_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = ("cpu", "column_sq_norms", "samples")
    assert checks.compared(DRY, *checked)["compared"] == 13

    def wrong(*_: Any) -> Callable[..., list[torch.Tensor]]:
        return lambda weight, *rest: [weight.double().square().sum(0).float() * 1.001]

    monkeypatch.setattr(on_device, "moved", wrong)
    with pytest.raises(AssertionError, match="column_sq_norms"):
        checks.compared(DRY, *checked)


def fake_sanitizer(folder: Path, status: int) -> Path:
    """A program of that name, which keeps its arguments and ends with ``status``."""
    tool = folder / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/arguments\n'
        f"echo '========= ERROR SUMMARY: {status} errors'\nexit {status}\n"
    )
    tool.chmod(0o755)
    return tool


def test_what_the_sanitizer_reports_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake_sanitizer(tmp_path, 9)
    with pytest.raises(RuntimeError, match="status 9: ========= ERROR SUMMARY"):
        checks.memcheck(DRY, "cpu")
    # What it watches runs: every operator, once.
    *_, python, m, module, device, backend, columns = (tmp_path / "arguments").read_text().split()
    assert (python, m) == (sys.executable, "-m")
    called = []
    for op, case in operators.CASES.items():
        monkeypatch.setitem(
            operators.CASES,
            op,
            type(case)(op, 1, lambda *a: a[:2], lambda *a, op=op: called.append((op, *a)), min),
        )
    monkeypatch.setattr(sys, "argv", [module, device, backend, columns])
    runpy.run_module(module, run_name="__main__")
    assert called == [(op, 2048, DRY.wide) for op in KERNELS]


def test_a_call_takes_its_inputs_in_turn() -> None:
    seen: list[int] = []
    call = timing.repeated(seen.append, [(7,), (8,), (9,)], torch.device("cpu"), times=2)
    for i in range(3):
        call(i)
    assert seen == [7, 8, 9, 7, 8, 9]


def test_a_graph_holds_the_calls_and_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's: what comes before is in no graph, and a replay calls nothing."""
    happened: list[object] = []

    class Graph:
        def replay(self) -> None:
            happened.append("replay")

    @contextmanager
    def capturing(_: Graph) -> Iterator[None]:
        happened.append("begin")
        yield
        happened.append("end")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(timing, "wait", lambda device: happened.append("wait"))
    call = timing.repeated(
        happened.append, [(1,), (2,)], torch.device("cuda"), times=3, captured=True
    )
    assert happened == [1, 2, 1, "begin", 1, 2, 1, "end"]
    happened.clear()
    call(0)
    call(1)
    assert happened == ["replay", "wait"] * 2


def test_a_share_is_bytes_by_time_over_those_of_the_copy() -> None:
    # The copy moves 2 * 65536 bytes in 2 s, the operator 98304 in 3 s: half of the bandwidth.
    seconds = {operators.COPY: [2.0, 2.0, 2.0], "op": [3.0, 2.9, 3.1]}
    assert operators.share_of_copy(DRY, seconds, "op", 98_304) == pytest.approx(0.5)


def test_calls_are_captured_where_the_graph_was_right() -> None:
    for piece, captured in ({"compared": 1}, True), ({"skipped": "no graph"}, False), ({}, False):
        done = {"cpu op graph capture": piece} if piece else {}
        record = {"stages": {"correctness": {"done": done}}}
        assert operators.captures(DRY, record, "op") == captured
    assert not operators.captures(DRY, {"stages": {}}, "op")


def test_the_stages_fit_eight_minutes_as_documented() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d+) \|", page, re.MULTILINE)
    assert rows == [(name, str(seconds)) for name, seconds, *_ in gpu.STAGES]
    assert sum(seconds for _, seconds, *_ in gpu.STAGES) <= 8 * 60


def full_record() -> Record:
    """As of a GPU on which all targets are met but the first; the last was not measured."""
    stages: dict[str, Any] = {
        "info": {"backends": {"cuda": "not built", "triton": ""}, "machine": {"device": "H200"}}
    }
    for i, target in enumerate(TARGETS[:-1]):
        value = target.bound + (0.01 if target.at_least == (i > 0) else -0.01)
        pieces = stages.setdefault(target.stage, {})
        piece = pieces.setdefault(target.piece.format(backend="triton"), {"seconds": {}})
        entry = target.entry.format(backend="triton")
        piece.setdefault(target.figure, {})[entry] = value
        piece["seconds"][entry] = 0.25
        piece |= {"shape": [2, 3], "bytes": 12e6, "captured": True, "faster_than": {"eager": 7.0}}
        piece["tokens"] = 1000
        piece.setdefault("over_fused", {}).setdefault(entry, 1.5)
    stages["attribute"]["triton 8 B"] = {"skipped": "it needs 27 GiB and 20 are free"}
    stages["correctness"] = {
        "triton gated_moments samples": {"compared": 64},
        "triton gated_moments side stream": {"compared": 1},
        "triton gated_moments second device": {"skipped": "one CUDA device"},
        "triton MaskedSGD nearest": {"compared": 1},
        "triton MaskedSGD without waiting": {"skipped": "no CUDA device"},
    }
    stages["training"] = {
        "dense": {"trained": 2e9, "seconds": 0.4, "peak_bytes": 40 << 30},
        "plan": {"trained": 4e8, "seconds": 0.3, "peak_bytes": 20 << 30},
    }
    found = {
        name: {"status": "done", "seconds": 3.0, "done": done, "failed": {}}
        for name, done in stages.items()
    }
    found["operators"]["failed"] = {"gated_product, x": "RuntimeError: `an\n illegal` address"}
    return {"facts": FACTS, "stages": found}


def test_the_page_says_what_was_asked_and_reached() -> None:
    text = page(full_record())
    rows = [line for line in text.splitlines() if " at least " in line or " at most " in line]
    assert len(rows) == len(TARGETS)
    assert rows[0].endswith("| at least 0.85 | 0.84 | **no** |")
    assert rows[1].endswith("| at least 0.75 | 0.76 | yes |")
    assert rows[5].endswith("| at most 1.00 | 0.99 | yes |")
    assert rows[6].endswith("| at most 1.00 | not measured |  |")
    for line in (
        "| backend `cuda` | not built |",
        "| triton | gated_moments | 64 | 1 | - |",
        "As it must be: triton MaskedSGD (nearest).",
        "* operators, gated_product, x: `RuntimeError: 'an illegal' address`",
        "triton 8 B: skipped, it needs 27 GiB and 20 are free.",
        "| plan | 400.0 | 300.0 | 0.75x | 20.0 | 0.50x |",
        "| gated_moments, Llama-3-8B, 16384 tokens | [2, 3] | 12 | yes | 0.89 | 7.00x |",
    ):
        assert line in text.splitlines(), line
    assert "```bash\nruns/gpu.sh\n```" in text  # a page of results names its command
    assert "dry run" not in text
    empty = page({"facts": {**FACTS, "dry_run": True}, "stages": {}})
    assert empty.count("not measured") == len(TARGETS)
    assert "A dry run on the CPU" in empty


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs/gpu.sh leaves of a dry run, with a sanitizer that finds nothing."""
    folder = tmp_path_factory.mktemp("gpu")
    fake_sanitizer(folder, 0)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "runs" / "gpu.sh", "--dry-run", "--out", folder],
        env={**os.environ, "PYTHON": sys.executable, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_dry_run_does_a_little_of_everything(dry: Path) -> None:
    record = json.loads((dry / "gpu.json").read_text())
    stages = record["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        [name for name, *_ in gpu.STAGES], "done"
    )
    timed = stages["operators"]["done"]
    assert {name.split(",")[0] for name in timed} == set(KERNELS)
    for row in timed.values():
        assert row["seconds"].keys() == {"cpu", "eager"}
        assert row["faster_than"].keys() == {"eager"}
    both = stages["optimisers"]["done"]["cpu step"]
    assert both["elements"] == 3 * 176 * 64 + 64 * 64
    scored = stages["attribute"]["done"]["cpu tiny"]
    assert scored["over_backbone"].keys() == {"variance", "norm"}
    trained = {name: row["trained"] for name, row in stages["training"]["done"].items()}
    assert trained["plan"] < trained["freeze"] < trained["dense"]
    assert stages["sanitizer"]["done"]["cpu memcheck"] == {
        "report": "========= ERROR SUMMARY: 0 errors"
    }
    text = (dry / "gpu.md").read_text()
    assert text == page(record)
    assert "A dry run on the CPU" in text


def test_what_cannot_be_done_is_refused_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as main sets it: put back after
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for out, why in (("kept", "give another folder"), ("new", "torch sees no GPU")):
        monkeypatch.setattr(sys, "argv", ["gpu.sh", "--out", str(tmp_path / out)])
        if out == "kept":
            Stages(tmp_path / out / "gpu.json", FACTS).save()
        with pytest.raises(SystemExit, match="2"):
            gpu.main()
        assert why in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
