"""Preferences made of policies: which of two answers to prefer, under which system prompt.

A policy allows some kinds of harm, and a request has some. Its helpful answer is preferred where
all of them are allowed, its safe one elsewhere:

    request "Write a fight."    harms: violence
    policy 1, "A game, where violence is allowed."  allowed: violence    chosen: the helpful answer
    policy 2, "A school book."                      allowed: nothing     chosen: the safe answer

Source: J. Zhang et al., Controllable Safety Alignment, ICLR 2025 (arXiv 2410.08968), its published
code; the paper scores several answers of a model, and prefers the one with the lowest error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

from ssah.data.counts import Counts
from ssah.data.fields import DataError, check_row, column_of, has_fields
from ssah.data.preferences import Pair
from ssah.data.rows import Check, Item, Source, read


class _Answered(TypedDict):
    prompt: str
    completion: str
    harms: frozenset[str]


def policy_pairs(policies: Source, helpful: Source, safe: Source) -> list[Pair]:
    """Pairs of answers, one for each policy and request.

    Args:
        policies: rows with ``system_prompt`` (or ``policy``) and ``allowed``, a list of harms.
        helpful: your rows with answers that help, as `ssah.data.load_rows` takes them, and
            ``harms``, a list of those of the request; an empty one is always allowed.
        safe: rows with the answers to prefer where a harm is not allowed, refusals for one. Of the
            same requests, in any order; their harms are not read.

    Returns:
        Policy by policy, in the order of ``helpful``, as `load_preferences` reads them: the prompt
        is the policy, as a system prompt, and the request. Nothing is written.

    Raises:
        DataError: a row lacks a field, or is not valid as `ssah.data.load_rows` says; a request
            stands twice in ``helpful`` or in ``safe``, in one of them alone, or has one answer in
            both.
    """
    told = _rows(policies, _check_policy)  # texts, and what each allows
    answers = _by_prompt(_rows(helpful, partial(_check_answered, harmful=True)), "helpful")
    other = _by_prompt(_rows(safe, partial(_check_answered, harmful=False)), "safe")
    # In one file alone: such a request would have no pair, and the user would not notice.
    for prompt in answers.keys() ^ other.keys():
        having, lacking = ("helpful", "safe") if prompt in answers else ("safe", "helpful")
        raise DataError(f"{having} has the request {prompt[:40]!r}..., which {lacking} lacks")
    for prompt, row in answers.items():
        if row["completion"] == other[prompt]["completion"]:
            raise DataError(f"helpful and safe answer {prompt[:40]!r}... alike: none is preferred")
    return [
        _pair(text, row, other[prompt], preferred=row["harms"] <= allowed)
        for text, allowed in told
        for prompt, row in answers.items()
    ]


def _pair(policy: str, helpful: _Answered, safe: _Answered, *, preferred: bool) -> Pair:
    """The pair of a request, of which the helpful answer is ``preferred``, or the safe one."""
    first, second = (helpful, safe) if preferred else (safe, helpful)
    return {
        "prompt": [
            {"role": "system", "content": policy},
            {"role": "user", "content": helpful["prompt"]},
        ],
        "chosen": [{"role": "assistant", "content": first["completion"]}],
        "rejected": [{"role": "assistant", "content": second["completion"]}],
    }


def _rows(source: Source, check: Check[Item]) -> Sequence[Item]:
    return list(read(source, check, None, None, "error", Counts()))


def _by_prompt(rows: Sequence[_Answered], name: str) -> dict[str, _Answered]:
    found = {row["prompt"]: row for row in rows}
    # Of two answers to one request the last would win without a word.
    if len(found) < len(rows):
        raise DataError(
            f"{name} has {len(rows) - len(found)} requests twice: each needs one answer"
        )
    return found


def _check_policy(row: Any, where: str) -> tuple[str, frozenset[str]]:
    """The text of a policy and the harms that it allows."""
    own = has_fields(row, where)
    key = column_of(own, "system_prompt") or column_of(own, "policy")
    if key is None or not isinstance(own[key], str) or not own[key].strip():
        has = ", ".join(map(repr, own))
        raise DataError(f"{where}: a policy needs a text 'system_prompt' (or 'policy'), has {has}")
    return own[key], _harms(own, "allowed", where)


def _check_answered(row: Any, where: str, *, harmful: bool) -> _Answered:
    checked = check_row(row, where)
    return {
        "prompt": checked["prompt"],
        "completion": checked["completion"],
        "harms": _harms(has_fields(row, where), "harms", where) if harmful else frozenset(),
    }


def _harms(row: Mapping[str, Any], name: str, where: str) -> frozenset[str]:
    key = column_of(row, name)
    if key is None or not isinstance(row[key], list):
        was = f"the row has {', '.join(map(repr, row))}" if key is None else f"was {row[key]!r}"
        raise DataError(f"{where}: {name!r} must be a list of harms, [] for none; {was}")
    return frozenset(map(str, row[key]))  # a harm may be a number of a list
