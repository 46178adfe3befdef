"""How rows are read and rendered: what a command's options say, for all of its data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ssah.choices import Overlong
from ssah.data.asking import Asked, load_asked
from ssah.data.counts import Counts
from ssah.data.fields import Row
from ssah.data.loader import Loader, make_loader
from ssah.data.requests import load_requests
from ssah.data.rows import Invalid, RowStream, Source, load_rows
from ssah.data.templates import template_record, use_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reading:
    """How rows are read, and how conversations are rendered."""

    # As `ssah.data.load_rows` takes them.
    prompt_column: str | None = None
    response_column: str | None = None
    invalid: Invalid = "error"
    # As `ssah.data.encode` takes it.
    overlong: Overlong = "cut"
    # As `ssah.data.use_template` takes them.
    template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)

    def rows(
        self,
        source: str | os.PathLike[str],
        split: str | None = None,
        limit: int | None = None,
        counts: Counts | None = None,
    ) -> list[Row] | RowStream[Row]:
        """Rows with responses, see `ssah.data.load_rows`."""
        return load_rows(
            source,
            split,
            limit,
            prompt_column=self.prompt_column,
            response_column=self.response_column,
            invalid=self.invalid,
            counts=counts,
        )

    def requests(
        self,
        source: str | os.PathLike[str],
        limit: int | None = None,
        counts: Counts | None = None,
    ) -> list[str]:
        """Prompts alone, see `ssah.data.load_requests`."""
        return load_requests(
            source,
            limit,
            prompt_column=self.prompt_column,
            invalid=self.invalid,
            counts=counts,
        )

    def asked(
        self,
        source: str | os.PathLike[str],
        by: Sequence[str] = (),
        policy: bool = False,
        counts: Counts | None = None,
    ) -> list[Asked]:
        """Prompts with their categories or policies, see `ssah.data.load_asked`."""
        return load_asked(
            source,
            by=by,
            policy=policy,
            prompt_column=self.prompt_column,
            invalid=self.invalid,
            counts=counts,
        )

    def loader(
        self,
        rows: Source | RowStream[Row],
        tokenizer: PreTrainedTokenizerBase,
        counts: Counts,
        **options: Any,
    ) -> Loader:
        """Batches of rows, see `ssah.data.make_loader`."""
        own = self.tokenizer(tokenizer)
        return make_loader(rows, own, overlong=self.overlong, counts=counts, **options)

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """``tokenizer``, which renders as was chosen, see `ssah.data.use_template`."""
        return use_template(tokenizer, self.template, **self.template_options)

    def settings(self) -> dict[str, Any]:
        """What was chosen, for the identity of a run: fields that differ from the default."""
        # Those alone, so that a run of an older version, which had fewer options, can go on.
        default = asdict(Reading())
        return {key: value for key, value in asdict(self).items() if value != default[key]}


def rows_read(tokenizer: PreTrainedTokenizerBase, counts: Counts) -> dict[str, Any]:
    """What a result says of its rows: how many were left out and cut, and the chat template."""
    return {**counts.to_dict(), "template": template_record(tokenizer)}


def template_options(given: Iterable[str]) -> dict[str, Any]:
    """The options that ``KEY=VALUE`` texts name; a value is JSON where it can be, else a text.

    Raises:
        ValueError: a text has no ``=``, or names an option for a second time.
    """
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(
                f"template option is {text!r}, must be KEY=VALUE, enable_thinking=false for one"
            )
        if key in options:
            raise ValueError(f"template option {key!r} is given twice, must be given once")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
