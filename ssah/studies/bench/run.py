"""The command: measure all, print tables, write ``bench.json`` and ``bench.png``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ssah.report import SCORING
from ssah.report.pictures import plot_throughput
from ssah.report.terminal import new_table
from ssah.studies.bench.cases import CASES
from ssah.studies.bench.operators import measure_op
from ssah.studies.bench.scoring import measure_attribute
from ssah.studies.bench.settings import FULL, QUICK, Settings
from ssah_kernels import backends, timing


def run_bench(out: Path, *, quick: bool, threads: int | None = None) -> dict[str, Any]:
    """Measure, print tables, and write ``bench.json`` and ``bench.png`` to ``out``.

    Args:
        out: a folder.
        quick: one small shape in bfloat16 and no ``torch.compile``: under a minute.
        threads: of torch; None leaves them as they are.

    Returns:
        What ``bench.json`` holds, as plain data.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(highlight=False)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    no_compile = "left out by --quick" if quick else _compile_missing(device)
    settings = QUICK if quick else FULL
    measured, scoring = _measure(settings, device, no_compile is None, console)
    result = {
        **timing.facts(),
        "device": str(device),
        "backend": backends.choose(device),
        "quick": quick,
        "compile": no_compile or "measured",
        "read_gigabytes_per_second": _read_bandwidth(device),
        "operators": measured,
        "attribute": scoring,
    }
    for dtype in dict.fromkeys(row["dtype"] for row in measured):
        console.print(_op_table(result, dtype))
    console.print(_attribute_table(scoring))
    out.mkdir(parents=True, exist_ok=True)
    picture = plot_throughput(result, out / "bench.png")
    result["picture"] = str(picture)
    # No NaN: not every reader of JSON takes it.
    (out / "bench.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    console.print(f"Written: {out / 'bench.json'}, {picture}")
    return result


def _measure(
    settings: Settings, device: torch.device, compiled: bool, console: Console
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each operator and dtype, and what ``attribute`` takes; shows how far it is."""
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(CASES) * len(settings.dtypes) + 1)
        for dtype in settings.dtypes:
            for case in CASES.values():
                bar.update(task, description=case.op)
                rows.append(measure_op(case, settings, dtype, device, compiled))
                bar.advance(task)
        bar.update(task, description="attribute")
        scoring = measure_attribute(settings, device, compiled)
        bar.advance(task)
    return rows, scoring


def _compile_missing(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot run here; None if it can."""
    # On a CPU it writes C++, on a GPU Triton.
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler"
    if device.type != "cpu" and backends.missing("triton") is not None:
        return "no triton"
    return None


def _read_bandwidth(device: torch.device) -> float | None:
    """Gigabytes per second that a loop of plain loads reaches; None without such a loop here."""
    if device.type != "cpu" or backends.missing("cpu") is not None:
        return None
    n_bytes = 256 << 20  # more than any cache holds
    times = timing.interleave({"read": timing.read_bandwidth(n_bytes)}, repeats=5, warmup=1)
    return n_bytes / timing.percentiles(times["read"])["p50"] / 1e9


def _op_table(result: Mapping[str, Any], dtype: str) -> Table:
    measured = [row for row in result["operators"] if row["dtype"] == dtype]
    names = list(dict.fromkeys(name for row in measured for name in row["seconds"]))
    compared = [name for name in ("eager", "compile") if name in names]
    read = result["read_gigabytes_per_second"]
    rows, columns = measured[0]["shape"]
    limit = "" if read is None else f" (reading alone: {read:.1f})"
    table = new_table(
        f"Operators on {dtype} [{rows}, {columns}], GB/s{limit}",
        ("operator",),
        (*names, *(f"vs {name}" for name in compared)),
    )
    for row in measured:
        rates = row["gigabytes_per_second"]
        table.add_row(
            row["op"],
            # A row may lack a backend that another one has.
            *(f"{rates[name]:.3g}" if name in rates else "-" for name in names),
            *(f"{row['faster_than'][name]:.1f}x" for name in compared),
        )
    return table


def _attribute_table(scoring: Mapping[str, Any]) -> Table:
    table = new_table(
        f"attribute, Llama of {scoring['parameters'] / 1e6:.0f} M random parameters, "
        f"{scoring['dtype']}, {scoring['tokens']} tokens a batch",
        ("",),
        ("tokens/s", "time / forward"),
    )
    for name, rate in scoring["tokens_per_second"].items():
        ratio = scoring["time_over_eager"][name]
        table.add_row(SCORING[name], f"{rate:,.0f}", f"{ratio:.2f}x")
    return table
