"""Ablated and updated models as lm-eval and inspect_ai take them: every task of both runs on them.

lm-eval and inspect_ai are imported when what needs them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.evaluation.harnesses.loading import load_ablated
from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.evaluation.harnesses.inspect_provider import InspectModel
    from ssah.evaluation.harnesses.lm_eval_model import LmEvalModel

__all__ = ["InspectModel", "LmEvalModel", "load_ablated"]

__getattr__ = names_of(__name__, inspect_provider="InspectModel", lm_eval_model="LmEvalModel")
