"""What this library uses of others although they may move it: one file a library, nowhere else.

A name is looked up when it is first needed, so that a release without it takes away no more than
what needs it. :func:`find` then says what is gone, and which releases have it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["LibraryError", "find"]


class LibraryError(ImportError):
    """A library that this one builds on lacks a name that is needed."""


def find(library: str, place: str, *, purpose: str, works: str) -> Any:
    """The object at ``place``.

    Args:
        library: name of its distribution, e.g. ``"transformers"``.
        place: module and name, e.g. ``"transformers.utils:logging"``.
        purpose: what it is needed for: "which ssah needs ...".
        works: the releases that have it, as pip takes them, e.g. ``">=5.20,<=5.24"``.

    Raises:
        LibraryError: it is not there; the message has the installed release and what to install.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LibraryError(
            f"{library} {installed(library)} has no {module}.{name}, which ssah needs {purpose} "
            f"({error}); it must be a release that has it: pip install '{library}{works}'"
        ) from error


def installed(library: str) -> str:
    """The installed release of ``library``."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "(not installed)"
