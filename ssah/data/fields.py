"""One row: the columns that hold its prompt and its response, and what makes it valid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias, TypedDict

Message: TypeAlias = "dict[str, str]"  # one turn: "role" and "content"

# In this order. `goal`: AdvBench, JailbreakBench; `forbidden_prompt`: StrongREJECT; `behavior`:
# HarmBench (in JailbreakBench a short name of what `goal` asks, so that `goal` comes first);
# `augq`, `daugq`: SALAD-Bench's questions under an attack, and for a defence.
_PROMPT = (
    "prompt",
    "instruction",
    "question",
    "goal",
    "forbidden_prompt",
    "behavior",
    "augq",
    "daugq",
    "input",
)
_RESPONSE = ("completion", "response", "output", "answer")  # in this order
_AFTER = ("input", "context")  # of an instruction or question, after it
_BEFORE = "contextstring"  # of a behavior of HarmBench, before it, as HarmBench joins them
_NOT_A_RESPONSE = (
    " ('target' of AdvBench and JailbreakBench is how a model begins that complies: it is no "
    "refusal, and taken for a response only where it is named; `ssah refusals` writes the "
    "model's own refusals of such requests)"
)


class DataError(ValueError):
    """A row that cannot be used; the message names its file and line, or its index, and why."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold prompt and response; None: the first of the usual names that there is."""

    prompt: str | None = None
    response: str | None = None


class _PromptCompletion(TypedDict):
    prompt: str
    completion: str


class Row(_PromptCompletion, total=False):
    """A checked row.

    `completion` is the response; `prompt` is the turn before it. A row that came as `messages`
    keeps the whole conversation there, up to and including the response. `category` is kept
    where the source has one.
    """

    messages: list[Message]
    category: str


def check_row(row: Any, where: str, columns: Columns = Columns()) -> Row:
    """Return `row` with the standard fields; checked rows come back equal.

    Raises:
        DataError: beginning with `where`, as `ssah.data.load_rows` describes.
    """
    own = has_fields(row, where)
    if own.get("messages") is not None and columns == Columns():  # a named column comes first
        checked = _from_messages(own["messages"], where)
    else:
        prompt = _prompt(own, where, columns)
        _, completion = _column(own, _RESPONSE, columns.response, "response", where)
        checked = {"prompt": prompt, "completion": completion}
    _check_filled(checked["prompt"], where, "the prompt")
    _check_filled(checked["completion"], where, "the response")
    category = column_of(own, "category")
    if category is not None and isinstance(own[category], str):
        checked["category"] = own[category]
    return checked


def check_request(row: Any, where: str, columns: Columns = Columns()) -> str:
    """The prompt of `row`, which needs no response.

    Raises:
        DataError: beginning with `where`, as `ssah.data.load_requests` describes.
    """
    own = has_fields(row, where)
    if own.get("messages") is not None and columns.prompt is None:
        turns = own["messages"]
        # A conversation that waits for its answer: one is put there, and not looked at.
        if isinstance(turns, list) and not any(_is_answer(turn) for turn in turns):
            turns = [*turns, {"role": "assistant", "content": "-"}]
        prompt = _from_messages(turns, where)["prompt"]
    else:
        prompt = _prompt(own, where, columns)
    _check_filled(prompt, where, "the prompt")
    return prompt


def check_text(text: str, where: str, what: str) -> None:
    """Refuse, with DataError, half of a surrogate pair: JSON can write it, no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} has {text[error.start]!a} at character {error.start}, half of a "
            "character (a lone surrogate), which is no text: mend the row"
        ) from error


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse an argument that is no whole number (TypeError), or too small (ValueError)."""
    # numpy's integers count too; True is a number by descent alone.
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} is {value!r}, must be a whole number")
    if value.__index__() < least:
        raise ValueError(f"{name} is {value}, must be at least {least}")


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    return "missing" if value is None else f"of type {type(value).__name__}"


def has_fields(row: Any, where: str) -> Mapping[str, Any]:
    """``row``, where it has named fields; else DataError, beginning with ``where``."""
    if isinstance(row, DataError):  # a line of a file that is no row
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be an object with named fields, was {kind_of(row)}")
    return row


def _prompt(row: Mapping[str, Any], where: str, columns: Columns) -> str:
    key, prompt = _column(row, _PROMPT, columns.prompt, "prompt", where)
    if not prompt.strip():
        return prompt
    if key.casefold() in ("instruction", "question"):
        context = next(filter(None, (_context(row, name) for name in _AFTER)), "")
        return f"{prompt}\n\n{context}" if context else prompt
    context = _context(row, _BEFORE) if key.casefold() == "behavior" else ""
    return f"{context}\n\n---\n\n{prompt}" if context else prompt


def _context(row: Mapping[str, Any], name: str) -> str:
    """What the column of that name adds to a prompt; empty where it adds nothing."""
    key = column_of(row, name)
    text = None if key is None else row[key]
    return text if isinstance(text, str) and text.strip() else ""


def _column(
    row: Mapping[str, Any], names: tuple[str, ...], named: str | None, what: str, where: str
) -> tuple[str, str]:
    """The column, and what it holds: that which was named, else the first of ``names``."""
    has = ", ".join(repr(key) for key in row) or "no field"
    if named is not None:
        key: str | None = named
        if row.get(named) is None:
            raise DataError(f"{where}: no {what}: {what}_column is {named!r}, the row has {has}")
    else:
        keys = (column_of(row, name) for name in names)
        key = next((each for each in keys if each is not None and row[each] is not None), None)
    if key is None:
        target = what == "response" and column_of(row, "target") is not None
        raise DataError(
            f"{where}: no {what}: needs one of {', '.join(map(repr, names))}, or 'messages', or "
            f"the name of its column (--{what}-column, {what}_column=); has {has}"
            + (_NOT_A_RESPONSE if target else "")
        )
    if not isinstance(row[key], str):
        raise DataError(f"{where}: {key!r} must be a string, was {kind_of(row[key])}")
    return key, row[key]


def column_of(row: Mapping[str, Any], name: str) -> str | None:
    """The column of that name, in whatever case."""
    if name in row:
        return name
    wanted = name.casefold()
    return next((key for key in row if isinstance(key, str) and key.casefold() == wanted), None)


def _check_filled(text: str, where: str, what: str) -> None:
    check_text(text, where, what)
    if not text.strip():
        raise DataError(f"{where}: {what} is empty (--skip-invalid, invalid='skip' leaves it out)")


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"


def turns_of(messages: Any, where: str, name: str = "messages") -> list[Message]:
    """The turns of a conversation; DataError, beginning with ``where``, if it has another form.

    ``name``: of the field that has them, for messages.
    """
    if not isinstance(messages, list):
        raise DataError(f"{where}: {name!r} must be a list of turns, was {kind_of(messages)}")
    turns: list[Message] = []
    for number, turn in enumerate(messages):
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: {name}[{number}] must be an object, was {kind_of(turn)}")
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                raise DataError(
                    f"{where}: {name}[{number}] must have a string {key!r}, "
                    f"was {kind_of(turn.get(key))}"
                )
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns


def _from_messages(messages: Any, where: str) -> Row:
    turns = turns_of(messages, where)
    while turns and turns[-1]["role"] != "assistant":  # what was said after the last response
        turns.pop()
    if not turns:
        raise DataError(f"{where}: 'messages' has no assistant turn, so there is no response")
    if len(turns) == 1:
        raise DataError(f"{where}: 'messages' has no turn before the response")
    return {
        "prompt": turns[-2]["content"],
        "completion": turns[-1]["content"],
        "messages": turns,
    }
