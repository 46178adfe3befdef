"""A folder of many files that appears in one step: whole, or not at all.

A checkpoint has a dozen files, of which none is of use alone. They are written to a folder beside
the one that is meant, ``.tuned.4711.tmp`` for ``tuned``, which is given its name at the very end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssah.storage.files import naming, sync


def check_named(place: str | os.PathLike[str]) -> Path:
    """``place`` as a path, once it is known to have a name, which others beside it are made of.

    Raises:
        ValueError: it is the current folder, for which an empty text is taken, or a root.
    """
    path = Path(place)
    if path.name in ("", ".."):
        raise ValueError(f"out is {str(place)!r}; it must end with the name of what is written")
    return path


def check_new(folder: str | os.PathLike[str]) -> Path:
    """``folder`` as a path, once it is known to be free.

    Raises:
        ValueError: it has no name, as of `check_named`.
        FileExistsError: it is a file, or a folder with something in it.
    """
    path = check_named(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"folder {str(path)!r} is there already, must be new or empty: choose another one, or "
            "remove it"
        )
    return path


@contextmanager
def whole_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Inside the block a folder to write to, which becomes ``folder`` if the block ends well.

    After an error nothing is left of it. What a killed process leaves has another name.

    Raises:
        FileExistsError: ``folder`` is a file, or has something in it.
        OSError: the disk is full, or the like.
    """
    path = check_new(folder)
    # In the same folder, so that to rename it is one step; of this process, so that two do not mix.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        with naming(path):
            for each in (*temporary.rglob("*"), temporary):
                sync(each)
            os.replace(temporary, path)  # fails where somebody has filled it meanwhile
            sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
