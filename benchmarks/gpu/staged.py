"""Stages that run one after another within a time limit, and what they leave when it ends.

A stage is a list of pieces: a name, and a function that returns plain data. Suppose that stages a
and b may take 60 and 30 seconds, and that the second of a's three pieces meets an illegal address:

    a  first done, second failed (with its error), third done in a new process
    b  has until second 90, whatever a left of its 60

Every stage runs in a process of its own, which is forked: a GPU that met an illegal address answers
nothing more in the process that did it, so that the rest goes on in a new one. What is over its
time is killed with all that it started. The record is written whole after every piece. A rerun with
the same record computes what is missing, what failed included.

This file needs Python alone, because the first stage may have to build everything else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Piece = tuple[str, Callable[[], Mapping[str, Any]]]
Record = dict[str, Any]
_FORK = multiprocessing.get_context("fork")
_LISTING = "(what it has to do)"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its key in the record.
        seconds: it may take so long, and what earlier stages left of their time.
        pieces: lists its pieces; called in the stage's process with the record so far.
    """

    name: str
    seconds: float
    pieces: Callable[[Record], Iterable[Piece]]


class Stages:
    """A record on disk and the stages that fill it.

    Raises:
        ValueError: the record was made with other facts (another commit, another torch).
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.record: Record = {"facts": dict(facts), "stages": {}}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["facts"] != self.record["facts"]:
                raise ValueError(
                    f"{path} was made with {kept['facts']}, and this is {self.record['facts']}: "
                    "give another folder, or delete the file"
                )
            self.record = kept

    def save(self) -> None:
        """Write the record, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def run(self, stages: Sequence[Stage], between: Callable[[], object] = lambda: None) -> None:
        """Run what is missing; ``between`` is called in this process after each stage."""
        until = time.monotonic()
        for stage in stages:
            # Counted on from the start: what one leaves of its time, the next ones may use.
            until += stage.seconds
            if self.record["stages"].get(stage.name, {}).get("status") != "done":
                self._run_stage(stage, until)
            between()

    def _run_stage(self, stage: Stage, until: float) -> None:
        start = time.monotonic()
        done = self.record["stages"].get(stage.name, {}).get("done", {})
        own: dict[str, Any] = {"status": "out of time", "seconds": 0.0, "done": done, "failed": {}}
        self.record["stages"][stage.name] = own
        status = None
        while status is None and time.monotonic() < until:
            status = self._run_process(stage, own, until)
            own["seconds"] = round(time.monotonic() - start, 3)
        own["status"] = status or "out of time"
        self.save()
        print(f"{stage.name}: {own['status']}, {own['seconds']:.1f} s", flush=True)

    def _run_process(self, stage: Stage, own: dict[str, Any], until: float) -> str | None:
        """Take what one process sends; the stage's status, or None if another has to go on."""
        receiver, sender = _FORK.Pipe(duplex=False)
        settled = {*own["done"], *own["failed"]}
        process = _FORK.Process(target=_work, args=(stage, self.record, settled, sender))
        process.start()
        sender.close()  # ours: the end of the process is then the end of what comes
        assert process.pid is not None
        _lead(process.pid)
        current, begun = _LISTING, time.monotonic()
        try:
            while receiver.poll(max(0.0, until - time.monotonic())):
                try:
                    kind, *message = receiver.recv()
                except EOFError:  # it ended without a word, as a process with a broken pointer does
                    how = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                    kind, message = "failed", [f"its process ended with status {how.si_status}"]
                if kind == "end":
                    return "failed" if own["failed"] else "done"
                if kind == "begun":
                    current, begun = message[0], time.monotonic()
                    continue
                own[kind][current] = message[0]
                self.save()
                took = time.monotonic() - begun
                print(f"  {stage.name}: {current}: {kind}, {took:.1f} s", flush=True)
                if kind == "failed":
                    return "failed" if current == _LISTING else None
                current = _LISTING
            return "out of time"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.join()


def in_fork(function: Callable[[], Any]) -> Any:
    """What a function returns in a process of its own, where CUDA may begin and libraries load.

    Raises:
        RuntimeError: the process ended without returning; what it printed says why.
    """
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    process.join()
    if not receiver.poll() or process.exitcode != 0:
        raise RuntimeError(f"a process ended with status {process.exitcode}")
    return receiver.recv()


def _lead(pid: int) -> None:
    """Make a process the first of a group, so that it can be ended with all that it starts.

    Its parent and it do this, because either may be first.
    """
    os.setpgid(pid, pid)


def _work(stage: Stage, record: Record, settled: set[str], sender: Connection) -> None:
    """In the stage's process: compute the pieces that are not settled, and tell of each."""
    _lead(os.getpid())
    try:
        for name, compute in stage.pieces(record):
            if name not in settled:
                sender.send(("begun", name))
                # No NaN, which not every reader of JSON takes: the piece fails, and not the record.
                found = json.dumps(dict(compute()), allow_nan=False)
                sender.send(("done", json.loads(found)))
    except Exception as error:
        # Told to the process that started this one, which writes it down and starts the next.
        traceback.print_exc()
        sys.stderr.flush()
        sender.send(("failed", f"{type(error).__name__}: {error}"[:2000]))
        return
    sender.send(("end",))
