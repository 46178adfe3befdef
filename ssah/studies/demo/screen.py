"""What the demonstration shows while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


def heading(console: Console, part: str, title: str) -> None:
    console.print()
    console.print(Text.assemble((f"{part} ", "bold cyan"), (title, "bold")))


@contextmanager
def bar(console: Console, what: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar; yields a function that sets how far it is."""
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda completed: progress.update(task, completed=min(completed, total))
        progress.update(task, completed=total)
