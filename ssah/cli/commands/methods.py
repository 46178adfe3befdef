"""``ssah methods``."""

from __future__ import annotations

from typing import Annotated

import typer

from ssah.cli.running import Result

ORDER = 125


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Explain this one; default: list all.")
    ] = None,
) -> Result:
    """List the published methods that are here, or explain one: paper, equation, defaults, control.

    Example: `ssah methods sppft`
    """
    from ssah.methods import describe, names
    from ssah.report.terminal import method_tables, methods_table

    if name is not None:
        described = describe(name)
        return Result(described, tuple(method_tables(described)))
    every = [describe(each) for each in names()]
    return Result({"methods": every}, (methods_table(every),))
