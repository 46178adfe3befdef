"""How a command line is read: options take several values at once, and no path is empty."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from typer.core import TyperCommand

# A word that only looks like a number, such as 1.5.2, is for typer to refuse.
_NUMBER = re.compile(r"-?[0-9.]+(e-?[0-9]+)?")


def several_values(function: Callable[..., Any]) -> type[TyperCommand]:
    """A class of commands whose options that may be repeated also take several values at once:
    ``--seeds 0 1 2`` is ``--seeds 0 --seeds 1 --seeds 2``. ``--out ""`` is refused: as a path it
    would be the current folder, where a script whose variable is empty wants to write nothing.

    Args:
        function: the command's, with the signature of which typer makes its options.
    """
    options, paths = _several_at_once(function), _paths(function)

    def fits(option: str, arg: str) -> bool:
        return arg in options[option] if options[option] else bool(_NUMBER.fullmatch(arg))

    class SeveralValues(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            spelled: list[str] = []
            option: str | None = None  # whose values these are
            for previous, arg in zip([None, *args], args, strict=False):
                empty = previous in paths if arg == "" else arg[-1] == "=" and arg[:-1] in paths
                if empty:
                    raise typer.BadParameter(f"{arg or previous} is empty, must be a path")
                if arg in options:
                    option = arg
                # What follows an option is its value already; more are those that could be one.
                elif option is not None and previous != option:
                    if fits(option, arg):
                        spelled.append(option)
                    else:
                        option = None
                spelled.append(arg)
            return super().parse_args(ctx, spelled)

    return SeveralValues


def _several_at_once(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """Options that take several numbers or choices: name -> its choices, if any."""
    found: dict[str, tuple[str, ...]] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint, *option = get_args(parameter.annotation) or (None,)
        for each in (hint, *get_args(hint)):  # list[X], and the same in list[X] | None
            kind: Any = get_args(each)[0] if get_origin(each) is list else str
            if kind in (int, float) or issubclass(kind, Enum):
                # typer.Option holds its first spelling as a default, until typer reads it.
                found[option[0].default] = tuple(kind) if issubclass(kind, Enum) else ()
    return found


def _paths(function: Callable[..., Any]) -> set[str]:
    """Options that take a path, in every spelling."""
    return {
        spelling
        for parameter in inspect.signature(function).parameters.values()
        for hint, *option in [get_args(parameter.annotation) or (None,)]
        if Path in (hint, *get_args(hint))
        for spelling in (option[0].default, *(option[0].param_decls or ()))
        if isinstance(spelling, str)
    }
