"""The folder of an experiment: what was asked, the steps that are done, and the result.

A step is computed once and kept as JSON, written whole or not at all. The same command therefore
goes on where it was interrupted, whatever interrupted it; another command in the same folder is
refused. ``experiment.json`` carries all that is needed to run it again.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from ssah.storage import RECORD, Fields, one_run, read_record, read_sealed, sealed, write_whole
from ssah.version import __version__

_STEPS = "steps"
_FIELDS: Fields = {
    "kind": str,
    "settings": dict,
    "data": dict,
    "command": str,
    "started": str,
    "seconds": float,
    "finished": bool,
}
_STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class OutOfTime(RuntimeError):
    """The time that a run was given is up. What is done is kept; the same command goes on."""


class Run:
    """One experiment in one folder, resumable.

    Attributes:
        deadline: by ``time.perf_counter``, after which no further step begins.

    Args:
        out: the folder; made if need be.
        kind: what the experiment is, e.g. ``"scan"``.
        settings: plain data: everything that changes the result (model, shares, seeds, sizes).
        data: what was read: role, e.g. ``"safety"``, -> ``{"source", "rows", "fingerprint"}``.

    One run at a time is under way in a folder: from `begin`, which takes the folder, to the end of
    the block. A finished experiment stays finished, whatever becomes of the call that looks at it.

    Raises:
        ValueError: the folder has another experiment, or one with other settings or data.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        kind: str,
        settings: Mapping[str, Any],
        data: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.out, self.deadline = Path(out), float("inf")
        self.record: dict[str, Any] = {
            "kind": kind,
            # As JSON has them: a tuple is a list, so that they compare equal to what was kept.
            "settings": json.loads(json.dumps(settings, allow_nan=False)),
            "data": json.loads(json.dumps(data, allow_nan=False)),
            "command": _command(),
            "versions": {
                "ssah": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "finished": False,
        }
        # Looked at already here, so that another experiment is refused before a model is loaded.
        self._go_on()
        self._start = time.perf_counter() - self.record["seconds"]

    @contextmanager
    def begin(self) -> Iterator[None]:
        """The folder is this run's inside the block, and the record is in it.

        Raises:
            ValueError: another run is under way there, or has begun something else meanwhile.
            OSError: the folder cannot be written to.
        """
        with one_run(self.out):
            self._go_on()  # again: another process may have begun here while a model was loaded
            self._start = time.perf_counter() - self.record["seconds"]
            if not self.record["finished"]:
                self._write()
            yield

    def _go_on(self) -> None:
        """Take over what the folder has of this experiment; refuse another one."""
        if not (self.out / RECORD).is_file():
            return
        earlier = read_run(self.out)
        advice = "take another folder, or remove this one"
        if earlier["kind"] != self.record["kind"]:
            raise ValueError(
                f"{str(self.out)!r} has the experiment {earlier['kind']!r}, "
                f"not {self.record['kind']!r}: {advice}"
            )
        # Versions and threads may differ: they change rounding, not what was asked.
        for part in ("settings", "data"):
            for key in sorted({*earlier[part], *self.record[part]}):
                before, now = earlier[part].get(key), self.record[part].get(key)
                if before != now:
                    raise ValueError(
                        f"{str(self.out)!r} has this experiment with {key} {before!r}, not "
                        f"{now!r}: {advice}"
                    )
        if earlier["finished"]:
            self.record = earlier
            return
        # The first command stands, and seconds add up over all calls.
        for key in ("command", "started", "seconds"):
            self.record[key] = earlier[key]

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of ``compute()`` (plain data), from the folder if it is there already.

        Args:
            name: of the step: letters, digits, ``.``, ``_`` and ``-``.
            compute: called when the step was not done yet. Must not return generated text.

        Raises:
            ValueError: what the folder has of the step was damaged; its file is named.
            OutOfTime: the step is not done yet, and it is later than `deadline`.
        """
        if not _STEP_NAME.fullmatch(name):
            raise ValueError(f"step is {name!r}; it must match {_STEP_NAME.pattern}")
        if not self.done(name):
            if time.perf_counter() > self.deadline:
                raise OutOfTime(f"the time is up before step {name!r}")
            start = time.perf_counter()
            # NaN is no JSON, and would be a result that nobody looked at.
            result = json.loads(json.dumps(compute(), allow_nan=False))
            took = {"seconds": time.perf_counter() - start}
            path = self._file(name)
            path.parent.mkdir(exist_ok=True)
            write_whole(path, sealed({"step": name, "result": result, **took}))
            self._write()
        # Read back even when it was written just now: a run that goes on sees the same value.
        return self.result(name)

    def done(self, name: str) -> bool:
        """Whether the step is in the folder."""
        return self._file(name).is_file()

    def result(self, name: str) -> Any:
        """Of a step that is done; ValueError where its file was damaged."""
        return self._read(name)["result"]

    def seconds(self, name: str) -> float | None:
        """How long a step took; None: it is not done, or an earlier version did it."""
        return self._read(name).get("seconds") if self.done(name) else None

    def _file(self, name: str) -> Path:
        return self.out / _STEPS / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_sealed(self._file(name), {"step": str})
        except ValueError as error:
            raise ValueError(f"{error}; remove it, and the step is done again") from error

    def finish(self, result: Mapping[str, Any], pictures: Sequence[Path] = ()) -> dict[str, Any]:
        """Write the record with its result, and return it.

        Args:
            result: plain data.
            pictures: PNG files in the folder, in the order of the report.
        """
        self.record["result"] = result
        self.record["pictures"] = [str(path.relative_to(self.out)) for path in pictures]
        self.record["finished"] = True
        self._write()
        return self.record

    def _write(self) -> None:
        # `_start` lies back by the seconds of earlier calls.
        self.record["seconds"] = time.perf_counter() - self._start
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=2, allow_nan=False) + "\n"
        write_whole(self.out / RECORD, text.encode())


def read_run(out: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of the experiment in a folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it was cut off or is no such record; the file is named.
    """
    path = Path(out) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"directory {str(out)!r} has no {RECORD}: no experiment is there")
    return read_record(path, _FIELDS)


def _command() -> str:
    """What the user typed, without the folders of paths from the root: they are another's."""
    name = Path(sys.argv[0]).name
    started = ["python", "-m", "ssah.cli"] if name == "__main__.py" else [name]
    return shlex.join([*started, *map(_without_folders, sys.argv[1:])])


def _without_folders(word: str) -> str:
    """``/home/somebody/task.jsonl`` is ``task.jsonl``, also behind ``--data=``."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else word
