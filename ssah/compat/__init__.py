"""What this library uses of others although they may move it: here and nowhere else.

A name is looked up when it is first needed, so that a release without it takes away no more than
what needs it. The error then says what is gone, and which releases have it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from ssah.lazy import submodules_of

__all__ = ["Library", "LibraryError"]


class LibraryError(ImportError):
    """A library that this one builds on lacks a name that is needed."""


class Library(NamedTuple):  # dataclasses take a fifth of what `import ssah` takes
    """A library whose private names are used.

    Attributes:
        name: of its distribution, e.g. ``"transformers"``.
        works: the releases that have what is used, as pip takes them, e.g. ``">=5.20,<5.25"``.
        extra: of ssah, which installs it; None: ssah always does.
    """

    name: str
    works: str
    extra: str | None = None

    def find(self, place: str, purpose: str) -> Any:
        """The object at ``place``, module and name, e.g. ``"transformers.utils:logging"``.

        Args:
            place: where it is.
            purpose: what ssah needs it for, e.g. ``"to load a GGUF file"``.

        Raises:
            LibraryError: it is not there, or cannot be imported.
        """
        module, _, name = place.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise self.lacks(f"{module}.{name}", purpose, str(error)) from error

    def lacks(self, what: str, purpose: str, reason: str | None = None) -> LibraryError:
        """The error that says that the installed release has no ``what``, and what to install.

        Arguments as of :meth:`find`; ``reason`` is what Python said.
        """
        from importlib.metadata import PackageNotFoundError, version  # 10 ms, hardly ever needed

        try:
            release = version(self.name)
        except PackageNotFoundError:
            if self.extra is not None:
                return LibraryError(
                    f"{self.name} is not installed, which ssah needs {purpose}: pip install "
                    f"'ssah[{self.extra}]'"
                )
            release = "(not installed)"
        why = "" if reason is None else f" ({reason})"
        return LibraryError(
            f"{self.name} {release} has no {what}, which ssah needs {purpose}{why}; it must be a "
            f"release that has it: pip install '{self.name}{self.works}'"
        )


__getattr__ = submodules_of(__name__)
