"""One process at a time in a folder: short writes wait for each other, long runs do not.

Both hold a lock of the operating system, which goes with the process however it ends: a process
that was killed blocks nobody.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  # in the folder of a run that is under way; its content is for people
_TRIES = 1000  # to make a folder that others remove


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """One process at a time writes to ``folder``; another one waits until it has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which gives the lock back


@contextmanager
def one_run(folder: str | os.PathLike[str]) -> Iterator[None]:
    """One run at a time works in ``folder``, which is made; another one is refused at once.

    A folder that was made for a run that left nothing in it, because it was refused, is removed.

    Raises:
        ValueError: a run is under way there; its process and machine are named.
        OSError: the folder cannot be written to; it is named.
    """
    folder = Path(folder)
    path = folder / LOCK
    made = list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))
    descriptor = _locked(folder, path)
    try:
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode())
        yield
    finally:
        # Removed while it is still held: whoever opened it meanwhile sees that it is gone.
        if _same(descriptor, path):
            path.unlink()
            _remove_empty(made)
        os.close(descriptor)


def check_free(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that a run could not work in, before the run does anything that takes long.

    Raises:
        ValueError: a run is under way there.
        OSError: it is a file, or cannot be written to.
    """
    with one_run(folder):
        pass


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove ``folders``, innermost first, up to one that has something in it."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it has: of this run, or of another one that has begun since
            return


def _locked(folder: Path, path: Path) -> int:
    tries = 0
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError):
            # A run that left nothing may just have removed the folder, or one that holds it. A
            # file of that name stays.
            tries += 1
            if folder.is_file():
                raise FileExistsError(
                    f"folder is {str(folder)!r}, which is a file; it must be a folder, or new"
                ) from None
            if tries == _TRIES:
                raise FileNotFoundError(
                    f"folder is {str(folder)!r}, which cannot be made; it must be where one can "
                    "write"
                ) from None
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = _refusal(folder, os.read(descriptor, 4096))
            os.close(descriptor)
            raise ValueError(message) from None
        if _same(descriptor, path):
            return descriptor
        os.close(descriptor)  # the run that made this file has ended and removed it


def _same(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is the one that the folder has under this name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _refusal(folder: Path, content: bytes) -> str:
    try:
        holder = json.loads(content)
        who = f"process {holder['pid']} on {holder['host']}"
    except (ValueError, LookupError, TypeError):  # it has just begun, and not written it yet
        who = "another process"
    return (
        f"{who} is running in {str(folder)!r}: wait until it has ended, or take another folder "
        "(its lock goes with the process, and needs no removing)"
    )
