"""Preferences: two answers to one request, of which one is preferred.

A row has three texts, or turns of a conversation as TRL takes them. Both of these are the same:

    {"prompt": "How do I pick a lock?", "chosen": "I can't help.", "rejected": "Sure."}

    {"prompt": [{"role": "user", "content": "How do I pick a lock?"}],
     "chosen": [{"role": "assistant", "content": "I can't help."}],
     "rejected": [{"role": "assistant", "content": "Sure."}]}

Turns may begin with a system prompt. What is read is always turns.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal, TypedDict

from ssah.data.counts import Counts
from ssah.data.fields import DataError, Message, Row, check_text, has_fields, kind_of, turns_of
from ssah.data.rows import Invalid, read

_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}  # of the last turn


class Pair(TypedDict):
    """Two answers to one request, of which one is preferred; turns, as TRL takes them."""

    prompt: list[Message]  # perhaps a system prompt and earlier turns, and the request
    chosen: list[Message]
    rejected: list[Message]


def load_preferences(
    source: str | os.PathLike[str], *, invalid: Invalid = "error", counts: Counts | None = None
) -> list[Pair]:
    """Read preferences; arguments and errors as of `ssah.data.load_rows`.

    Args:
        source: rows with ``prompt``, ``chosen`` and ``rejected``, of which each is a text or turns;
            answers are one turn.
        invalid, counts: as `ssah.data.load_rows` takes them.

    Raises:
        DataError: a row is none; or both of its answers are the same.
    """
    counts = Counts() if counts is None else counts
    return list(read(source, _check, None, None, invalid, counts))


def check_preferences(rows: Iterable[Any]) -> list[Pair]:
    """Rows in memory, as `load_preferences` reads them from a file; errors as of it."""
    pairs = [_check(row, f"preferences[{number}]") for number, row in enumerate(rows)]
    if not pairs:
        raise DataError("preferences is empty; it must have at least one row")
    return pairs


def request_of(pair: Pair) -> str:
    """What is asked: the last turn before the answers."""
    return pair["prompt"][-1]["content"]


def answered(pair: Pair, side: Literal["chosen", "rejected"]) -> Row:
    """The row with one of the answers, as `ssah.data.encode` takes it."""
    turns = [*pair["prompt"], *pair[side]]
    return {
        "prompt": request_of(pair),
        "completion": turns[-1]["content"],
        "messages": turns,
    }


def _check(row: Any, where: str) -> Pair:
    own = has_fields(row, where)
    missing = [key for key in _ROLES if own.get(key) is None]
    if missing:
        raise DataError(
            f"{where} lacks {' and '.join(missing)}; a preference must have prompt, chosen and "
            "rejected"
        )
    prompt, chosen, rejected = (_turns(own[key], key, where) for key in _ROLES)
    # Its loss would be log 2 whatever the model is: it could only hide a mistake in the file.
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same, so that none is preferred")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _turns(value: Any, key: str, where: str) -> list[Message]:
    """A text as the one turn that it is, and turns checked."""
    role = _ROLES[key]
    if not isinstance(value, str | list):
        raise DataError(f"{where}: {key} must be a text or a list of turns, was {kind_of(value)}")
    given = [{"role": role, "content": value}] if isinstance(value, str) else value
    turns = turns_of(given, where, key)
    roles = [turn["role"] for turn in turns]
    if not roles or roles[-1] != role or (key != "prompt" and len(roles) > 1):
        must = "end with a user's" if key == "prompt" else "be one of the assistant"
        raise DataError(f"{where}: {key} has turns of {roles}; they must {must}")
    if not turns[-1]["content"].strip():
        raise DataError(f"{where}: {key} is empty (--skip-invalid, invalid='skip' leaves it out)")
    for turn in turns:
        check_text(turn["content"], where, key)
    return turns
