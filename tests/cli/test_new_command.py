"""A command is one file: it is added to a copy of the package, and nothing else is edited."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssah

COUNT = '''"""``ssah count``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from ssah.cli.running import Result
from ssah.settings import check_settings, setting

ORDER = 25  # in `ssah --help`: after classify, which is 20


@dataclass(frozen=True)
class CountSettings:
    """What is counted."""

    of: Literal["rows", "letters"] = setting("rows", "What is counted.")
    limit: int | None = setting(None, "Rows read.", panel="Data", min=1)
    weights: tuple[float, ...] = setting((1.0,), "Of the sum.", option="--weight", above=0)

    def __post_init__(self) -> None:
        check_settings(self)


def count(
    data: Annotated[str, typer.Argument(metavar="DATA", help="File or `builtin:safety`.")],
    settings: CountSettings,
) -> Result:
    """Count what a data set has.

    Example: `ssah count builtin:safety --limit 3`
    """
    from ssah.data import load_rows

    rows = load_rows(data, limit=settings.limit)
    counted = len(rows) if settings.of == "rows" else sum(len(row["prompt"]) for row in rows)
    return Result({settings.of: counted * sum(settings.weights)}, (f"{counted} {settings.of}",))
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(ssah.__file__).parent, folder / "ssah", ignore=ignored)
    (folder / "ssah" / "cli" / "commands" / "count.py").write_text(COUNT)
    return folder


def called(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "120"}
    command = [sys.executable, "-m", "ssah.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=given, cwd=copy, timeout=120)


def test_help_lists_it_where_it_says(copy: Path) -> None:
    names = re.findall(r"^\W+([a-z]+)  +[A-Z]", called(copy, "--help").stdout, flags=re.MULTILINE)
    assert names[names.index("classify") :][:3] == ["classify", "count", "ablate"]


def test_help_of_it_has_its_settings(copy: Path) -> None:
    shown = " ".join(called(copy, "count", "--help").stdout.split())
    for part in ("--of", "rows|letters", "default: rows", "--limit", "x>=1", "--weight", "--json"):
        assert part in shown, part


def test_it_runs(copy: Path) -> None:
    words = ("count", "builtin:safety", "--limit", "3", "--weight", "1", "0.5", "--json")
    assert json.loads(called(copy, *words).stdout) == {"rows": 4.5}
    assert called(copy, "count", "builtin:safety", "--limit", "3").stdout == "3 rows\n"


def test_a_file_without_a_function_of_its_name_is_named(copy: Path) -> None:
    misnamed = copy / "ssah" / "cli" / "commands" / "total.py"
    misnamed.write_text(COUNT)
    try:
        said = called(copy, "--help").stderr
    finally:
        misnamed.unlink()
    assert f"{misnamed} has no function 'total'" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("count", "builtin:nothing"), "builtin:nothing"),
        (("count", "builtin:safety", "--weight", "0"), "weights is 0.0; it must be greater than 0"),
    ],
)
def test_its_wrong_input_is_refused_as_that_of_others(
    copy: Path, words: tuple[str, ...], named: str
) -> None:
    refused = called(copy, *words)
    assert refused.returncode == 2
    assert named in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
