"""Options that take several values at once."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from typer.core import TyperCommand

__all__ = ["many_values"]

_NUMBER = re.compile(r"-?[0-9.]+(e-?[0-9]+)?")


def many_values(*numbers: str, **choices: Collection[str]) -> type[TyperCommand]:
    """A class of commands whose options that may be repeated also take several values at once:
    ``--seeds 0 1 2`` is ``--seeds 0 --seeds 1 --seeds 2``.

    Args:
        numbers: names of options that take numbers, e.g. ``"--seeds"``.
        choices: option without dashes -> what it takes.
    """
    named = {f"--{name}": values for name, values in choices.items()}

    def fits(option: str, arg: str) -> bool:
        return arg in named[option] if option in named else bool(_NUMBER.fullmatch(arg))

    class ManyValues(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            spelled: list[str] = []
            option: str | None = None  # whose values these are
            for previous, arg in zip([None, *args], args, strict=False):
                if arg in (*numbers, *named):
                    option = arg
                elif option is not None and previous != option:
                    if fits(option, arg):
                        spelled.append(option)
                    else:
                        option = None
                spelled.append(arg)
            return super().parse_args(ctx, spelled)

    return ManyValues
