"""Command lines that are wrong in one thing: one line names it, and the exit code is 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken import NEW, break_models, break_results, break_rows, lines
from commands import prepare
from typer.testing import CliRunner

from ssah.cli import app

pytestmark = pytest.mark.xdist_group("wrong commands")  # its fixtures are made once

SAMPLE = 9  # of the default run: every ninth


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("runs"), 12)


@pytest.fixture(scope="module")
def zoo(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name in ("models", "scores", "groups"):
        (folder / name).mkdir()
    break_models(folder / "models", runs / "model")
    break_rows(folder / "rows")
    break_results(folder / "scores", runs / "safety")
    break_results(folder / "groups", runs / "groups")
    return folder


def faults(words: tuple[str, ...], named: str) -> list[str]:
    """What is wrong with how a wrong command line was refused."""
    result = CliRunner().invoke(app, list(words))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    found = []
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        found.append(f"raised {result.exception!r}")
    if result.exit_code != 2:
        found.append(f"exit code {result.exit_code}")
    if result.stdout and words[0] != "demo":  # which says first what it will do
        found.append("something on standard output")
    if "Traceback" in result.output or "a fault of ssah" in result.output:
        found.append("a traceback")
    if len(errors) != 1 or result.stderr.splitlines()[-1:] != errors:
        found.append(f"{len(errors)} lines of error, or something after it")
    elif named not in errors[0]:
        found.append(f"{named!r} is not named")
    return [f"{each}: {' '.join(words)[:400]!r}: {result.stderr[-600:]}" for each in found]


def check(runs: Path, zoo: Path, every: int) -> int:
    wrong, n = [], 0
    for n, line in enumerate(lines(runs, zoo), start=1):
        if n % every == 0:
            own = (word.replace(NEW, str(zoo / f"new-{n}")) for word in line.words)
            wrong += faults(tuple(own), line.named)
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    return n


@pytest.mark.parametrize(
    "every", [SAMPLE, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["sample", "all"]
)
def test_a_wrong_command_line_is_refused_in_one_line(
    every: int, runs: Path, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert check(runs, zoo, every) >= 300


# ------------------------------------------------------------------------ in a process of its own


# Two commands, since most of what one takes is to import what it needs.
TWICE = """
import json, os, runpy, sys
for words in json.loads(sys.argv[1]):
    # As the interpreter would have read them, whatever the encoding of this locale.
    sys.argv[1:] = [os.fsdecode(word.encode()) for word in words]
    try:
        runpy.run_module("ssah.cli", run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code or 0, file=sys.stderr, flush=True)
"""


def ssah_twice(*commands: tuple[object, ...], **environment: str) -> list[bytes]:
    """The lines of standard error of both commands; after each, how it ended."""
    given = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    words = json.dumps([[str(word) for word in words] for words in commands])
    command = [sys.executable, "-c", TWICE, words]
    found = subprocess.run(command, capture_output=True, env=given, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stderr.splitlines()


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is not set"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
    ],
)
def test_half_of_a_launcher_is_named(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not faults(("info",), named)


ODD = {
    "PYTHONIOENCODING": "cp1252",
    "HOME": "/proc/nowhere",
    "COLUMNS": "3",
    "TERM": "dumb",
    "SSAH_CPU_CAPABILITY": "",
    "RANK": "",
    "WORLD_SIZE": "",
}
ODDER = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"},
    {"HOME": ""},
]


@pytest.mark.parametrize(
    "environment",
    [ODD, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ODDER)],
    ids=["odd", "ascii", "C", "no home"],
)
def test_odd_surroundings_do_not_matter(
    environment: dict[str, str], runs: Path, tmp_path: Path
) -> None:
    shares = ("--scu", "0.1", "--ucu", "0.1", "--ru", "0.2")
    out = tmp_path / "größe [/x]"
    command = ("classify", runs / "safety", runs / "utility", *shares, "--out", out)
    refused = ("classify", out, runs / "utility", *shares, "--out", out)
    *said, ended, error, refusal = ssah_twice(command, refused, **environment)
    assert (ended, refusal) == (b"ended with 0", b"ended with 2")
    assert error.startswith(b"error: ")
    assert b"Traceback" not in b"".join(said)
    assert (out / "meta.json").is_file()


@pytest.mark.exhaustive  # of a table; of JSON in tests/models/test_loading.py
def test_a_full_output_is_one_line(runs: Path) -> None:
    command = [sys.executable, "-m", "ssah.cli", "transfer", runs / "groups", runs / "groups"]
    with open("/dev/full", "wb") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=300)
    assert found.returncode in (1, 2)
    assert b"Traceback" not in found.stderr
    assert b"No space left" in found.stderr
