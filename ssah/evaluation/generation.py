"""Greedy answers to requests, in batches.

A batch of three prompts of 2, 4 and 3 tokens (p), padded on the left (.), and what is generated (n)
until each row ends its turn (E):

    . . p p | n n E .
    p p p p | n E . .        input_ids, attention_mask: [rows, width], new tokens: [rows, new]
    . p p p | n n n E

Padding stands on the left, so that every row goes on at the same column, ``width``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.data import Encoder, check_count
from ssah.evaluation.prompting import Request, check_room, longest_first, prompts
from ssah.evaluation.reasoning import opens_reasoning, spoken
from ssah.models import as_it_was, check_whole, device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OPENING_TOKENS = 16  # of a prompt's end: enough to hold what opens a block of reasoning


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens and surrounding white space; of a model that reasons, what it
            says after its reasoning.
        tokens: how many were generated, the one that ends the turn not counted.
        ended: whether the model ended its turn; otherwise it was cut off.
        unfinished: whether it ended inside its reasoning and says nothing: ``text`` is empty.
    """

    text: str
    tokens: int
    ended: bool
    unfinished: bool = False


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    system_prompt: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = False,
) -> list[str]:
    """The texts of :func:`generate`, one a request, in the order of the requests."""
    found = generate(
        model,
        tokenizer,
        requests,
        system_prompt=system_prompt,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return [answer.text for answer in found]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    system_prompt: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Answer]:
    """Answer requests greedily: the likeliest token at every step, whatever the model's settings.

    Requests of similar length share a batch, the longest first, padded on the left. A row is done
    when it ends its turn, a batch when all its rows are. The model, its mode and its generation
    settings, and the tokenizer are left as they were; inside ``ssah.ablate(...)`` the ablated model
    answers.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's.
        requests: strings, or rows as ``ssah.data.load_rows`` returns them (their responses are not
            used).
        system_prompt: the system message; None gives none, which leaves what the chat template
            says by itself.
        max_new_tokens: the most tokens of an answer.
        batch_size: requests answered at a time.
        progress: show a bar on standard error.

    Returns:
        One answer a request, in the order of the requests.

    Raises:
        TypeError: the model cannot generate.
        ValueError: no request, an argument out of range, or a prompt that leaves the model no room
            for the answer.
        DataError: a request is empty, or the chat template refuses it or the system message.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    encoded = prompts(tokenizer, requests, system_prompt=system_prompt)
    return answer_tokens(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )


def answer_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> list[Answer]:
    """As :func:`generate`, for prompts that are tokens already; errors as of it."""
    check_count("max_new_tokens", max_new_tokens)
    chunks = longest_first(encoded, batch_size)
    if not check_whole(model).can_generate():
        raise TypeError(
            f"model is a {type(model).__name__}, must be a causal language model that generates"
        )
    check_room(model, encoded, max_new_tokens)
    stops = stop_tokens(model, tokenizer)
    found: dict[int, Answer] = {}
    with (
        as_it_was(model),
        greedy(model, tokenizer, stops, max_new_tokens),
        bar(progress, len(encoded)) as advance,
    ):
        for chunk in chunks:
            new = _new_tokens(model, [encoded[i] for i in chunk])
            for i, ids in zip(chunk, new.tolist(), strict=True):
                found[i] = _answer(tokenizer, encoded[i], ids, stops)
            advance(len(chunk))
    return [found[i] for i in range(len(encoded))]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end the turn: the model's, the tokenizer's, and the chat template's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    # A template may end turns with a token that neither of the configurations names.
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    encoder = Encoder(tokenizer)
    if encoder.template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        _, response = encoder.render_turns(turns, "the chat template")
        last = encoder.tokenize(response)[-1]
        if encoder.decode([last]) in encoder.markers:  # else the turn ends with ordinary text
            stops.add(last)
    return sorted(stop for stop in stops if stop is not None)


@contextmanager
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    max_new_tokens: int,
) -> Iterator[None]:
    """Settings of greedy decoding in place of the model's own: sampling and penalties that came
    with the model would be merged into whatever is passed to its ``generate``."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    own = model.generation_config
    # A model without a padding token gets a token that ends its turn: the mask hides it anyway.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else (stops or [0])[0],
        bos_token_id=tokenizer.bos_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own


class Finite:
    """Notices logits that are NaN or +inf while a model generates; waits for no device."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:  # [rows, vocab_size]
        # -inf is how transformers forbids a token. The flag stays on the device until the end.
        bad = (logits.isnan() | (logits == torch.inf)).any()
        self.bad = bad if self.bad is None else self.bad | bad
        return logits

    def check(self) -> None:
        """Raise FloatingPointError if there were such logits: now the device is waited for."""
        if self.bad is not None and bool(self.bad):
            raise FloatingPointError(
                "the model's logits are NaN or infinite, so that it says nothing: an empty answer "
                "would count as a refusal or not by chance. Look at its weights, or use bfloat16 "
                "or float32 in place of float16"
            )


def _new_tokens(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """int64 ``[rows, new tokens]``; rows that are done are filled with the padding token."""
    given = left_padded(model, rows)
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # Else it is 1, a slice: a strided matrix, for which torch copies the vocabulary
        # projection once a row. An index gives a whole one: prefilling takes half the time.
        options["logits_to_keep"] = torch.tensor([-1], device=given["input_ids"].device)
    finite = Finite()
    generator: Any = model  # the types of its generate are of no use
    with torch.inference_mode():
        output = generator.generate(**given, logits_processor=[finite], **options)
    assert isinstance(output, Tensor)
    finite.check()
    return output[:, given["input_ids"].shape[1] :].cpu()  # [rows, width + new] -> [rows, new]


def left_padded(model: PreTrainedModel, rows: list[list[int]]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of prompts, int64 ``[rows, width]`` each."""
    width = max(map(len, rows))
    pad = model.generation_config.pad_token_id
    # Not that of its weight: a plan may have split it, and one that is offloaded is on no device.
    device = device_of(model.get_input_embeddings())
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _answer(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int], stops: list[int]
) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    # With special tokens, since those around reasoning may be special.
    text = str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))
    opened = opens_reasoning(str(tokenizer.decode(prompt[-_OPENING_TOKENS:])))
    said = spoken(text, opened=opened)
    if said is None:
        return Answer("", len(kept), end is not None, unfinished=True)
    if said == text:  # no reasoning: tokens are left out before they are joined to a text
        said = str(
            tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
    for token in tokenizer.all_special_tokens:  # what the decoding above has kept of them
        said = said.replace(token, "")
    return Answer(said.strip(), len(kept), end is not None)


@contextmanager
def bar(show: bool, total: int) -> Iterator[Any]:
    """A bar on standard error; yields a function that moves it on by so many answers."""
    if not show:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda count: shown.advance(task, count)
