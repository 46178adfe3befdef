"""What this library uses of others although they may move it: here and nowhere else.

A name is looked up when it is first needed, so that a release without it takes away no more than
what needs it. :func:`find` then says what is gone, and which releases have it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ssah.lazy import submodules_of

__all__ = ["LibraryError", "find", "lacking"]


class LibraryError(ImportError):
    """A library that this one builds on lacks a name that is needed."""


def find(library: str, place: str, *, purpose: str, works: str) -> Any:
    """The object at ``place``.

    Args:
        library: name of its distribution, e.g. ``"transformers"``.
        place: module and name, e.g. ``"transformers.utils:logging"``.
        purpose: what ssah needs it for, e.g. ``"to load a GGUF file"``.
        works: the releases that have it, as pip takes them, e.g. ``">=5.20,<5.25"``.

    Raises:
        LibraryError: it is not there, or cannot be imported.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise lacking(library, f"{module}.{name}", purpose, works, str(error)) from error


def lacking(
    library: str, name: str, purpose: str, works: str, reason: str | None = None
) -> LibraryError:
    """The error that says what the installed release of ``library`` lacks, and what to install.

    Arguments as of :func:`find`; ``reason`` is what Python said.
    """
    from importlib.metadata import PackageNotFoundError, version  # 10 ms, and hardly ever needed

    try:
        release = version(library)
    except PackageNotFoundError:
        release = "(not installed)"
    why = "" if reason is None else f" ({reason})"
    return LibraryError(
        f"{library} {release} has no {name}, which ssah needs {purpose}{why}; it must be a release "
        f"that has it: pip install '{library}{works}'"
    )


__getattr__ = submodules_of(__name__)
