"""Options that take several values at once."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

__all__ = ["ManyValues"]

_NUMBER = re.compile(r"-?[0-9.]+(e-?[0-9]+)?")


class ManyValues(TyperCommand):
    """A command whose options that may be repeated also take several values at once:
    ``--seeds 0 1 2`` is ``--seeds 0 --seeds 1 --seeds 2``. Numbers and choices alone: a string
    that follows might be an argument of the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give each further value the name of its option, then parse as usual."""
        many = {name: p for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        spelled: list[str] = []
        name: str | None = None
        for previous, arg in zip([None, *args], args, strict=False):
            if arg in many:
                name = arg
            elif name is not None and previous != name:
                if _fits(many[name].type, arg):
                    spelled.append(name)
                else:
                    name = None
            spelled.append(arg)
        return super().parse_args(ctx, spelled)


def _fits(kind: Any, arg: str) -> bool:
    """Whether ``arg`` is a value of an option's type."""
    if hasattr(kind, "choices"):
        return arg in [getattr(choice, "value", choice) for choice in kind.choices]
    return kind.name.startswith(("int", "float")) and _NUMBER.fullmatch(arg) is not None
