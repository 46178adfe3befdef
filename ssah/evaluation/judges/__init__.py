"""Judges: did the model do what it should have refused?

A judge is named by a string or is any callable:

| name | judge |
|---|---|
| ``qi2023``, ``wei2024``, ``zou2023`` | keyword lists, see the JSON files here |
| ``FILE.json`` | a keyword list of your own, in the form of those files |
| ``hf:MODEL`` | a classifier of transformers, see :mod:`ssah.evaluation.judges.classifier` |
| ``openai:URL#MODEL`` | an endpoint, see :mod:`ssah.evaluation.judges.endpoint` |
| ``python:module.function`` | a function of request and answer that returns a bool |
"""

from __future__ import annotations

from ssah.evaluation.judges.base import Judge
from ssah.evaluation.judges.choose import judge, judge_names
from ssah.evaluation.judges.function import Function, Judged
from ssah.evaluation.judges.keywords import KEYWORDS, Keywords
from ssah.lazy import submodules_of

__all__ = ["KEYWORDS", "Function", "Judge", "Judged", "Keywords", "judge", "judge_names"]

__getattr__ = submodules_of(__name__)
