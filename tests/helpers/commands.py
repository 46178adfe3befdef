"""Calling the commands as a user does, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import tiny_chat
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from ssah.cli import app

SHARES = ("--scu", "0.05", "--ucu", "0.05", "--ru", "0.2")


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words that call a command, and the command, of all below a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def call(*arguments: object, code: int = 0) -> Any:
    """What a command printed; it must end with ``code``."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def fails(*arguments: object, code: int = 2) -> str:
    """The last line that a command printed, which must be its error."""
    result = call(*arguments, code=code)
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    return line


def printed(shown: RenderableType, width: int = 300) -> str:
    """What a terminal of so many characters shows of a table."""
    console = Console(width=width, record=True, file=StringIO())
    console.print(shown)
    return console.export_text()


def prepare(folder: Path, limit: int) -> Path:
    """Fills a folder with a model, its scores on ``limit`` rows of both built-in sets, groups."""
    tiny_chat.save(folder / "model")
    for name in ("safety", "utility"):
        data = ("--data", f"builtin:{name}", "--limit", limit)
        call("attribute", folder / "model", *data, "--out", folder / name)
    call("classify", folder / "safety", folder / "utility", *SHARES, "--out", folder / "groups")
    return folder


def as_json(*arguments: object) -> dict[str, Any]:
    """The command's standard output, which must be JSON and nothing else."""
    return json.loads(call(*arguments, "--json").stdout)
