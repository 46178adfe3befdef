"""Which of the requests in a file a study asks: the options of a command that say so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ssah.settings import check_settings, setting

_choosing = partial(setting, panel="Which requests")


@dataclass(frozen=True)
class Choosing:
    """Which requests are asked, and what their categories are."""

    by: tuple[str, ...] = _choosing(
        (),
        "Rates also by this column, with a macro mean: `category`, `1-category`; may be repeated.",
        metavar="COLUMN",
    )
    per_category: int | None = _choosing(
        None, "Draw as many requests of each category of the last --by.", min=1
    )
    leave_out: tuple[str, ...] = _choosing(
        (), "Not these: `source=AdvBench`; may be repeated.", metavar="COLUMN=VALUE"
    )
    seen: tuple[str, ...] = _choosing(
        (),
        "Rows that the model was trained or its units scored on: a request that is among them is "
        "refused; may be repeated.",
        metavar="FILE",
    )
    skip_seen: bool = _choosing(False, "Leave such requests out, and count them.")
    draw_seed: int = _choosing(0, "Of --per-category.")

    def __post_init__(self) -> None:
        check_settings(self)
        if len(set(self.by)) < len(self.by):
            raise ValueError(f"by is {' '.join(self.by)!r}; it must have each column once")
        if self.per_category is not None and not self.by:
            raise ValueError("per_category needs by: the column of the categories (--by COLUMN)")
        if self.skip_seen and not self.seen:
            raise ValueError("skip_seen needs seen: the rows that were seen (--seen FILE)")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that must be read."""
        # What is to be left out must be read first.
        unwanted = (text.partition("=")[0] for text in self.leave_out)
        return tuple(dict.fromkeys((*self.by, *unwanted)))


ALL = Choosing()  # every request, and nothing is known of them
