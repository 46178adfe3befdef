"""What a model is given to answer a request: the chat template, without a response."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ssah.choices import Overlong
from ssah.data import DataError, Encoder, check_count, kind_of, turns_of
from ssah.models import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPENING = 32  # tokens that the opening of an answer may take after a request

Request: TypeAlias = "str | Mapping[str, Any]"
Asking = TypeVar("Asking", bound=Request)


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    system_prompt: str | None = None,
    name: str = "requests",
) -> list[list[int]]:
    """The tokens that a model is given to answer each request: what ``ssah.data.encode`` puts
    before a response.

    Args:
        tokenizer, requests, system_prompt: as ``ssah.evaluation.generate`` takes them.
        name: of the requests, in messages.

    Raises:
        ValueError: no request, or a single string in place of a list.
        TypeError: ``system_prompt`` is no string.
        DataError: as ``ssah.evaluation.generate`` describes.
    """
    check_list(name, requests)
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise TypeError(f"system_prompt must be a string or None, was {kind_of(system_prompt)}")
    if not requests:
        raise ValueError(f"{name} is empty, must have at least one")
    encoder = Encoder(tokenizer)
    # No system message, not an empty one: many templates put their own where there is none.
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    result = []
    for index, request in enumerate(requests):
        where = f"{name}[{index}]"
        turns = [*system, *asked_turns(request, where)]
        result.append(encoder.prompt(turns, where))
    return result


def check_list(name: str, given: object) -> None:
    """Raise ValueError for a text or one row in the place of several.

    Its letters or fields would be taken for them.
    """
    if isinstance(given, (str, Mapping)):
        what = "a string" if isinstance(given, str) else "one row"
        raise ValueError(f"{name} is {what}, must be a list of strings or rows")


def asked_turns(request: Request, where: str) -> list[dict[str, str]]:
    """The turns that a request consists of, without a response.

    Raises:
        DataError: beginning with ``where``: it is neither a string nor a row, or it is empty.
    """
    if isinstance(request, str):
        turns = [{"role": "user", "content": request}]
    elif not isinstance(request, Mapping):
        raise DataError(f"{where}: a request must be a string or a row, was {kind_of(request)}")
    elif request.get("messages"):
        turns = turns_of(request["messages"], where)
        while turns and turns[-1]["role"] == "assistant":  # a row's response is not given away
            turns.pop()
    elif isinstance(request.get("prompt"), str):
        turns = [{"role": "user", "content": request["prompt"]}]
    else:
        raise DataError(f"{where}: a row must have 'prompt' or 'messages', has {sorted(request)}")
    if not turns or not turns[-1]["content"].strip():
        raise DataError(f"{where}: the request is empty")
    return turns


def longest_first(items: Sequence[Sized], batch_size: int) -> list[list[int]]:
    """Indices of items by batch, those of similar length together.

    The longest come first, so that a batch that does not fit in memory fails at once.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    check_count("batch_size", batch_size)
    order = sorted(range(len(items)), key=lambda i: -len(items[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def fitting(
    requests: Sequence[Asking],
    encoded: Sequence[Sequence[int]],
    most: int | None,
    *,
    overlong: Overlong,
    name: str = "requests",
) -> list[Asking]:
    """The requests that can be answered; those that are too long are left out with a warning.

    Args:
        requests: of one set, which messages call ``name``.
        encoded: their prompts, as tokens.
        most: the most tokens of one; None: any number.
        overlong: ``"skip"``; with anything else all of them are kept, to be refused by name.

    Raises:
        DataError: none is left.
    """
    if overlong != "skip" or most is None:  # what is too long is refused later, with its number
        return list(requests)
    kept = [text for text, ids in zip(requests, encoded, strict=True) if len(ids) <= most]
    if not kept:
        raise DataError(f"{name}: every request has more than {most} tokens, so that none is left")
    if len(kept) < len(requests):
        warnings.warn(
            f"{name}: {len(requests) - len(kept)} of {len(requests)} requests were left out: they "
            f"have more than {most} tokens",
            stacklevel=2,
        )
    return kept


def room_of(model: PreTrainedModel) -> int | None:
    """The most tokens that a model can be given, its answer included; None: no limit is known."""
    config = text_config(model)
    room: int | None = getattr(config, "max_position_embeddings", None)
    return room


def with_room(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Asking],
    max_new_tokens: int,
    *,
    overlong: Overlong,
    name: str = "requests",
    system_prompt: str | None = None,
) -> list[Asking]:
    """The requests that leave a model room for an answer; the others are refused or left out.

    Args:
        model, tokenizer: what answers.
        requests, overlong, name: as of `fitting`.
        max_new_tokens: of an answer.
        system_prompt: as `prompts` takes it.

    Raises:
        DataError: none is left.
        ValueError: one leaves too little room, and is not to be left out.
    """
    encoded = prompts(tokenizer, requests, system_prompt=system_prompt, name=name)
    room = room_of(model)
    most = None if room is None else room - max_new_tokens  # None: the model has no such limit
    kept = fitting(requests, encoded, most, overlong=overlong, name=name)
    if len(kept) == len(requests):
        check_room(model, encoded, max_new_tokens, name)
    return kept


def check_room(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    name: str = "requests",
) -> None:
    """Refuse, with ValueError, prompts that leave the model too few positions for an answer."""
    room = room_of(model)
    if room is None:  # Mamba, for one, has no positions
        return
    for index, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > room:
            raise ValueError(
                f"{name}[{index}] has {len(ids)} tokens as a prompt; with max_new_tokens = "
                f"{max_new_tokens} that is more than the {room} positions of the model"
            )
