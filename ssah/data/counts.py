"""What of a data set was not used as it is: rows left out, rows cut, prompts that repeat."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass
class Counts:
    """Of one data set; filled while it is read and encoded. All are numbers of rows but one."""

    rows: int = 0  # that were used
    invalid: int = 0  # left out because they are no valid rows
    overlong: int = 0  # left out because their prompt leaves no room for a response
    cut_rows: int = 0  # whose response lost its end
    cut_tokens: int = 0  # that they lost together
    repeated: int = 0  # whose prompt occurred earlier in the set

    def to_dict(self) -> dict[str, int]:
        """As plain data, for the record of a result."""
        return asdict(self)

    def warn_of_invalid(self, name: str, reason: str) -> None:
        """Say how many rows were not valid; ``reason``: of the first of them."""
        if self.invalid:
            _warn(f"{name}: rows left out because they are not valid: {self.invalid} ({reason})")

    def warn_of_repeated(self, name: str, prompts: Iterable[str]) -> None:
        """Count rows that repeat a prompt, and say how many do."""
        given = list(prompts)
        self.repeated = len(given) - len(set(given))
        if self.repeated:
            _warn(
                f"{name}: {self.repeated} of {len(given)} rows repeat a prompt that came before: "
                f"there are {len(set(given))} different ones, so that intervals over rows are too "
                "narrow and disjoint draws of rows share prompts"
            )

    def warn_of_length(self, max_length: int) -> None:
        """Say what ``max_length`` cost."""
        if self.overlong:
            _warn(
                f"{self.overlong} of {self.overlong + self.rows} rows were left out: their prompts "
                f"leave no room for a response within max_length = {max_length} tokens"
            )
        if self.cut_rows:
            _warn(
                f"{self.cut_rows} of {self.rows} rows are longer than max_length = {max_length} "
                f"tokens: the ends of their responses, {self.cut_tokens} tokens, were cut off, and "
                "with them the end of the turn"
            )


def warn_of_shared(name: str, prompts: Iterable[str], other: str, others: Iterable[str]) -> int:
    """Say how many different prompts two sets share that should share none; returns the number.

    What was tuned or calibrated on a prompt is not measured by it.
    """
    own = set(prompts)  # a prompt that repeats is one prompt
    shared = len(own & set(others))
    if shared:
        _warn(
            f"{shared} of the {len(own)} different prompts of {name} are also in {other}: what is "
            "measured on them was seen before"
        )
    return shared


def warn_of_small(column: str, sizes: Sequence[int], n: int) -> None:
    """Say how many categories have fewer rows than were to be drawn of each."""
    small = [size for size in sizes if size < n]
    if small:
        _warn(
            f"{len(small)} of {len(sizes)} categories of {column!r} have fewer than {n} rows, the "
            f"smallest {min(small)}: all of their rows are taken"
        )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
