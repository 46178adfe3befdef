"""What a model says to requests: prompts, greedy decoding, answers with and without reasoning."""

from __future__ import annotations

from ssah.evaluation.generating.caches import SHARED, cache_of, is_plain
from ssah.evaluation.generating.decoding import greedy, left_padded, prefilled
from ssah.evaluation.generating.finite_logits import Finite
from ssah.evaluation.generating.generation import (
    Answer,
    answer_tokens,
    answers,
    answers_of_arms,
    bar,
    fitting_rows,
    generate,
    stop_tokens,
)
from ssah.evaluation.generating.prompting import (
    OPENING,
    Request,
    asked_turns,
    check_list,
    check_room,
    fitting,
    longest_first,
    prompts,
    room_of,
    with_room,
)
from ssah.evaluation.generating.reasoning import spoken

__all__ = [
    "OPENING",
    "SHARED",
    "Answer",
    "Finite",
    "Request",
    "answer_tokens",
    "answers",
    "answers_of_arms",
    "asked_turns",
    "bar",
    "cache_of",
    "check_list",
    "check_room",
    "fitting",
    "fitting_rows",
    "generate",
    "greedy",
    "is_plain",
    "left_padded",
    "longest_first",
    "prefilled",
    "prompts",
    "room_of",
    "spoken",
    "stop_tokens",
    "with_room",
]
