"""``ssah evaluate``: attack success with its controls, utility and tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.evaluate.run import run_evaluation
    from ssah.studies.evaluate.settings import EvaluateSettings, answer_tokens

__all__ = ["EvaluateSettings", "answer_tokens", "run_evaluation"]

__getattr__ = names_of(
    __name__,
    run="run_evaluation",
    settings="EvaluateSettings answer_tokens",
)
