"""The code blocks of the pages: where they are, which commands they call, and running them.

A block of ``python`` is run. A block of ``bash`` is read by bash itself, which calls nothing: each
command is written down with its words, and a test runs it or parses it. A block of ``yaml`` is the
file that its first line names, ``# tasks/birds.yaml``. ``text`` and ``json`` show what is printed.
A block that cannot be run has the reason in a comment before it: ``<!-- not run: ... -->``.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ssah.cli import app

ROOT = Path(__file__).parents[2]
SHOWN = ("text", "json")  # what is printed, not what is typed

_BLOCK = re.compile(
    r"(?:^<!-- not run:(?P<reason>[^>]*)-->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
# Bash calls this in the place of every command that it does not find: here, all of them.
_WRITE_DOWN = r"""
command_not_found_handle() { printf '%s\x1f' "$@"; printf '\x1e'; }
basename() { printf '%s' "${1##*/}"; }
"""


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line of text, counted from 1
    language: str
    text: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page, in order; the page is named from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        indent, reason = found["indent"], found["reason"]
        yield Block(
            page,
            text.count("\n", 0, found.start("text")) + 1,
            found["language"],
            re.sub(f"^{indent}", "", found["text"], flags=re.MULTILINE),
            None if reason is None else reason.strip(),
        )


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a bash block, after bash has joined lines and taken quotes off.

    Nothing is called. The scripts in ``runs/`` have a slash in their name, which bash would look
    for as a file; ``script`` stands before it.
    """
    settings = r"^((?:\w+=(?:\"[^\"]*\"|\S+) )*)(?=runs/)"  # SSAH_CUDA=0 runs/...
    text = re.sub(settings, r"\1script ", block.text, flags=re.MULTILINE)
    read = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", f"{_WRITE_DOWN}\n{text}"],
        env={"PATH": "/nowhere"},  # an empty one would be the current folder
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.returncode == 0, f"{block}: bash cannot read it: {read.stderr}"
    return [line.split("\x1f")[:-1] for line in read.stdout.split("\x1e")[:-1]]


def check_command(words: list[str]) -> tuple[str, ...] | None:
    """Whether a command exists and takes these options and values; nothing is run.

    Returns:
        The words that name a command of ssah, such as ``("study", "freeze")``; None for another.
    """
    name, *arguments = words
    if name == "torchrun":
        start = arguments.index("-m")
        assert arguments[start + 1] == "ssah.cli", words
        name, arguments = "ssah", arguments[start + 2 :]
    if name == "ssah":
        return _parse_ssah(arguments)
    if name == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in arguments), words
    elif name == "script":
        script = ROOT / arguments[0]
        assert os.access(script, os.X_OK), f"there is no script {script}"
        named = [word for word in arguments[1:] if "/" not in word]  # a path is the reader's own
        assert all(word in script.read_text() for word in named), words
    elif name == "python":
        _parse_script(arguments)
    else:
        assert name == "pip", f"nobody knows how to check {words}"
    return None


def _parse_ssah(arguments: list[str]) -> tuple[str, ...]:
    command: Any = typer.main.get_command(app)
    path: list[str] = []
    while hasattr(command, "commands"):
        word = arguments[len(path)]
        assert word in command.commands, f"there is no command ssah {' '.join([*path, word])}"
        command = command.commands[word]
        path.append(word)
    # It raises a click.UsageError for an option, a choice or a number that the command lacks.
    command.make_context(" ".join(["ssah", *path]), arguments[len(path) :])
    return tuple(path)


class _Parsed(Exception):
    """Raised when the arguments of a script have been parsed: the script ends there."""


def _parse_script(arguments: list[str]) -> None:
    script = ROOT / arguments[0]
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        parse(parser, *args, **options)  # a SystemExit with code 2 where they are wrong
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(script), *arguments[1:]])
        patch.syspath_prepend(str(script.parent))
        with pytest.raises(_Parsed):
            runpy.run_path(str(script), run_name="__main__")


def run_command(words: list[str]) -> None:
    """Run a command of ssah in this process; ``smollm2`` is the folder of that name."""
    arguments = [f"./{word}" if word == "smollm2" else word for word in words[1:]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{words}: {result.output} {result.exception!r}"


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block among the names that the blocks before it left."""
    exec(_compiled(block, block.text.replace('"smollm2"', '"./smollm2"')), names)


def check_python(block: Block) -> None:
    """Whether a block that is not run compiles, and what it imports of this project exists."""
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        named = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssah")
        plain = isinstance(node, ast.Import) and node.names[0].name.startswith("ssah")
        if named or plain:
            exec(_compiled(block, ast.unparse(node)), {})


def _compiled(block: Block, text: str) -> Any:
    lines = "\n" * (block.line - 1)  # so that an error names the line of the page
    return compile(lines + text, str(ROOT / block.page), "exec", dont_inherit=True)


def write_file(block: Block) -> None:
    """Write a yaml block to the file that its first line names."""
    first = re.match(r"# (\S+\.yaml)\n", block.text)
    assert first, f"{block}: the first line must name the file, as in '# tasks/birds.yaml'"
    path = Path(first[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
