"""Greedy answers to requests, in batches: what a model says, as text.

For example, "How do I bake bread?" becomes the prompt that the chat template makes of it, `decode`
finds the tokens that follow, and the answer is their text up to the end of the turn, without
reasoning and special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ssah.data import Encoder, check_count
from ssah.evaluation.generating.decoding import decode, greedy, rows_at_once
from ssah.evaluation.generating.prompting import Request, check_room, longest_first, prompts
from ssah.evaluation.generating.reasoning import opens_reasoning, spoken
from ssah.interventions import Arms, ablate, arms, split_arms
from ssah.models import as_it_was, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.selections import Selection
    from ssah.units import UnitSet

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
        said: its tokens, the one that ends the turn not among them, and the log-probability of each
            by the model that answered, in nats; the latter are empty where nobody asked.
    """

    text: str
    tokens: int
    ended: bool
    unfinished: bool = False
    # Not compared: rounding differs with the batch.
    said: tuple[list[int], list[float]] = field(default=([], []), compare=False, repr=False)


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

    Requests of similar length share a batch, the longest first. A row that ends its turn leaves its
    batch. The model, its mode and its generation settings, and the tokenizer are left as they were;
    inside ``ssah.ablate(...)`` the ablated model answers.

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
            new = decode(model, [encoded[i] for i in chunk], stops, max_new_tokens)
            for i, ids in zip(chunk, new, strict=True):
                found[i] = _answer(tokenizer, encoded[i], ids, stops)
            advance(len(chunk))
    return [found[i] for i in range(len(encoded))]


def answers_of_arms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    jobs: Sequence[tuple[int, int]],
    selections: Sequence[UnitSet | Selection | None],
    *,
    max_new_tokens: int,
    at_once: int,
    scored: bool = False,
) -> list[Answer]:
    """Answers to prompts by a model with units taken out, all of them in shared batches.

    Args:
        model, tokenizer: as :func:`generate` takes them.
        encoded: prompts, as tokens; there is room for their answers.
        jobs: number of a selection, and number of a prompt that it is to answer.
        selections: of each arm what is out, as `ssah.ablate` takes it; None is the model as it is.
        max_new_tokens: the most tokens of an answer.
        at_once: rows of a batch.
        scored: whether what the model as it is says comes with its log-probabilities.

    Returns:
        One answer a job.
    """
    stops = stop_tokens(model, tokenizer)
    found: dict[int, Answer] = {}

    def answer(own: Sequence[int], run: Arms | None) -> None:
        """Answer the jobs of these numbers."""
        prompted = [encoded[jobs[i][1]] for i in own]
        for chunk in longest_first(prompted, at_once):
            rows, arm = [prompted[i] for i in chunk], [jobs[own[i]][0] for i in chunk]
            wanted = [k for k, number in enumerate(arm) if scored and selections[number] is None]
            said: dict[int, list[float]] = {k: [] for k in wanted}
            new = decode(model, rows, stops, max_new_tokens, run, arm, said)
            for k, (i, row, ids) in enumerate(zip(chunk, rows, new, strict=True)):
                found[own[i]] = _answer(tokenizer, row, ids, stops, said.get(k))

    units, alone = split_arms(model, selections)
    with as_it_was(model), greedy(model, tokenizer, stops, max_new_tokens):
        shared = [i for i, (arm, _) in enumerate(jobs) if arm not in alone]
        # The model as it is needs no arms, and may be one whose units we do not know.
        if any(units[jobs[i][0]] is not None for i in shared):
            with arms(model, units) as run:
                answer(shared, run)
        else:
            answer(shared, None)
        for arm, what in alone.items():
            own = [i for i, job in enumerate(jobs) if job[0] == arm]
            if own:  # else nothing need be taken out
                with ablate(model, what):
                    answer(own, None)
    return [found[i] for i in range(len(jobs))]


def fitting_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    least: int,
) -> int:
    """How many of these prompts to answer at a time: see :func:`rows_at_once`."""
    stops = stop_tokens(model, tokenizer)
    with as_it_was(model), greedy(model, tokenizer, stops, max_new_tokens):
        return rows_at_once(model, encoded, max_new_tokens, least)


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


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    ids: list[int],
    stops: list[int],
    log_probs: list[float] | None = None,
) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    scored = (kept, (log_probs or [])[: len(kept)])
    # With special tokens, since those around reasoning may be special.
    text = str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))
    opened = opens_reasoning(str(tokenizer.decode(list(prompt[-_OPENING_TOKENS:]))))
    said = spoken(text, opened=opened)
    if said is None:
        return Answer("", len(kept), end is not None, unfinished=True, said=scored)
    if said == text:  # no reasoning: tokens are left out before they are joined to a text
        said = str(
            tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
    for token in tokenizer.all_special_tokens:  # what the decoding above has kept of them
        said = said.replace(token, "")
    return Answer(said.strip(), len(kept), end is not None, said=scored)


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
