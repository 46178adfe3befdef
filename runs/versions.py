"""What runs/versions.sh puts into its table.

    versions.py facts      prints what the environment of this interpreter holds, as JSON
    versions.py table DIR  reads DIR/LEG/{facts.json,tests.xml} and writes docs/versions.md

A leg that was not run this time keeps its row.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
RECORD = ROOT / "docs" / "results" / "versions.json"
LEGS = ("floor", "pinned", "newest", "python")
BEGIN, END = "<!-- table: runs/versions.sh -->\n", "<!-- end of the table -->\n"
PACKAGES = (
    "torch", "triton", "transformers", "datasets", "safetensors", "accelerate", "peft", "trl",
    "bitsandbytes", "torchao", "gguf", "lm-eval", "typer", "rich", "matplotlib", "numpy",
)  # fmt: skip


def facts() -> dict[str, Any]:
    """The versions installed here, and what the libraries built here say of themselves."""
    from try_kernels import cpu_row, cuda_row

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": cpu_row(),
        "cuda": cuda_row(),
    }


def outcome(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and in how many seconds."""
    if not report.is_file():
        return {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0, "ended": False}
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    count = {
        key: sum(int(s.get(key, 0)) for s in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    failed = count["failures"] + count["errors"]
    return {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "seconds": round(sum(float(s.get("time", 0)) for s in suites)),
        "ended": True,
    }


def row(leg: str, record: dict[str, Any]) -> str:
    """One line of the table."""
    have, tests = record["versions"], record["tests"]
    others = ", ".join(f"{name} {have[name]}" for name in PACKAGES[3:] if have[name] is not None)
    came_out = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
    return (
        f"| {leg} | {record['python']} | {have['torch']} | {have['transformers']} "
        f"| {have['triton']} | {others} | {record['cuda']} | {came_out} | {record['date']} |"
    )


def table(folder: Path) -> None:
    """Adds what was run in ``folder`` to the record, and writes the page's table from it."""
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for leg in LEGS:
        if (found := folder / leg / "facts.json").is_file() and found.stat().st_size:
            record[leg] = {
                **json.loads(found.read_text()),
                "tests": outcome(folder / leg / "tests.xml"),
                "pins": [
                    line
                    for line in (folder / leg / "pins.txt").read_text().splitlines()
                    if "==" in line and "#" not in line
                ],
            }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "| set | Python | torch | transformers | triton | also | CUDA library | tests | date |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(leg, record[leg]) for leg in LEGS if leg in record),
    ]
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    if sys.argv[1:] == ["facts"]:
        print(json.dumps(facts(), indent=1))
    elif len(sys.argv) == 3 and sys.argv[1] == "table":
        table(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
