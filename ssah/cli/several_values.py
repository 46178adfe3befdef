"""Options that take several values at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from typer.core import TyperCommand

__all__ = ["several_values"]

_NUMBER = re.compile(r"-?[0-9.]+(e-?[0-9]+)?")


def several_values(options: Mapping[str, Collection[str]]) -> type[TyperCommand]:
    """A class of commands whose options that may be repeated also take several values at once:
    ``--seeds 0 1 2`` is ``--seeds 0 --seeds 1 --seeds 2``.

    Args:
        options: name such as ``"--seeds"`` -> its choices; none where it takes numbers.
    """

    def fits(option: str, arg: str) -> bool:
        return arg in options[option] if options[option] else bool(_NUMBER.fullmatch(arg))

    class SeveralValues(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            spelled: list[str] = []
            option: str | None = None  # whose values these are
            for previous, arg in zip([None, *args], args, strict=False):
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
