"""What every benchmark shares: the timing of ``ssah_kernels.timing``, and one JSON record."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from ssah_kernels import timing
from ssah_kernels.timing import interleave, percentiles, ratio, read_bandwidth, rotating

__all__ = ["facts", "interleave", "percentiles", "ratio", "read_bandwidth", "rotating", "write"]


def facts() -> dict[str, Any]:
    """What a figure depends on: versions, threads, instruction set, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {**timing.facts(), "commit": commit.stdout.strip() or "unknown"}


def write(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write a benchmark's record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"benchmark": name, **facts(), "rows": rows}, indent=2) + "\n")
    partial.replace(path)
