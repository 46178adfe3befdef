"""The steps of an experiment as they are taken, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ssah.report.terminal import as_data
from ssah.studies.run_folder import Run


class Steps:
    """Takes the steps of a run, with a bar and a line for each on standard error.

    Inside its block the folder is the run's (`Run.begin`).

    Args:
        run: the experiment.
        total: steps that it has.
    """

    def __init__(self, run: Run, total: int) -> None:
        self.run = run
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        # On standard error, because standard output is the result, which may be piped as JSON.
        console = Console(stderr=True, highlight=False)
        self.bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self.task = self.bar.add_task(run.record["kind"], total=total)

    def __enter__(self) -> Steps:
        with ExitStack() as stack:
            stack.enter_context(self.run.begin())
            self.bar.start()
            # Kept open until the end; had the bar not started, the folder would be free again.
            self._end = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()
        self._end.close()

    def __call__(
        self, name: str, compute: Callable[[], Any], line: Callable[[Any], str] | None = None
    ) -> Any:
        """As :meth:`Run.step`.

        Args:
            name, compute: of the step.
            line: what to print of its result.
        """
        kept, start = self.run.done(name), time.perf_counter()  # asked now: later it is done
        self.bar.update(self.task, description=as_data(name))
        result = self.run.step(name, compute)
        took = "done earlier" if kept else f"{time.perf_counter() - start:.0f} s"
        facts = "" if line is None else f"  {line(result)}"
        # A line stays above the bar, and in the log of a run that nobody watches.
        self.bar.console.print(f"{as_data(name + facts)}  [dim]({took})[/dim]")
        self.bar.advance(self.task)
        return result

    def together(
        self,
        names: Sequence[str],
        compute: Callable[[list[int]], Sequence[Any]],
        line: Callable[[Any], str] | None = None,
    ) -> list[Any]:
        """Several steps, of which those that are not done yet are computed in one go.

        Args:
            names: of the steps.
            compute: called once, with the numbers of these steps; returns their results.
            line: as :meth:`__call__` takes it.
        """
        left = [number for number, name in enumerate(names) if not self.run.done(name)]
        found: dict[int, Any] = {}

        def one(number: int) -> Any:
            if not found:
                found.update(zip(left, compute(left), strict=True))
            return found[number]

        return [self(name, partial(one, number), line) for number, name in enumerate(names)]

    @contextmanager
    def part(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for what a step is made of; yields a function that sets how far it is."""
        task = self.bar.add_task(f"  {what}", total=total)
        try:
            yield lambda completed: self.bar.update(task, completed=completed)
        finally:
            self.bar.remove_task(task)
