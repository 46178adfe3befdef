"""What every benchmark shares: timing, memory, processes of their own, and one JSON record.

Figures are ratios within one run on one machine, see ``ssah_kernels.timing``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.commit import commit
from ssah_kernels import timing
from ssah_kernels.timing import interleave, percentiles, ratio, read_bandwidth, rotating

__all__ = [
    "facts",
    "in_child",
    "interleave",
    "kibibytes",
    "percentiles",
    "ratio",
    "read_bandwidth",
    "rotating",
    "write",
]


def facts() -> dict[str, Any]:
    """What a figure depends on: versions, threads, instruction set, commit."""
    return {**timing.facts(), "commit": commit()}


def kibibytes(field: str) -> int:
    """A memory figure of this process: ``VmRSS`` is what it holds, ``VmHWM`` the most it held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_child(script: str, *arguments: object) -> dict[str, Any]:
    """The last line, which is JSON, of a script in a process of its own.

    Peak memory is a figure of a process: what else ran in it would be part of the peak.
    """
    command = [sys.executable, script, *map(str, arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def write(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write a benchmark's record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"benchmark": name, **facts(), "rows": rows}, indent=2) + "\n")
    partial.replace(path)
