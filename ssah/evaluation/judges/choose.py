"""A judge by its name."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from ssah.evaluation.judges.base import Function, Judge, Judged
from ssah.evaluation.judges.keywords import KEYWORDS, Keywords

__all__ = ["judge", "judge_names"]


def judge(name_or_callable: str | Judge | Judged) -> Judge:
    """The judge that is meant.

    Args:
        name_or_callable: a judge, a name as ``ssah.evaluation.judges`` lists them, or a function of
            request and answer that returns True where the attack succeeded.

    Raises:
        ValueError: no such judge; the message lists those that there are.
        TypeError: neither a string nor callable.
    """
    if isinstance(name_or_callable, Judge):
        return name_or_callable
    if callable(name_or_callable):
        return Function(name_or_callable)
    if not isinstance(name_or_callable, str):
        raise TypeError(
            f"judge is a {type(name_or_callable).__name__}, must be a name or a callable"
        )
    name = name_or_callable
    kind, _, rest = name.partition(":")
    if name in KEYWORDS:
        return Keywords.load(name)
    if kind == "python" and rest:
        return Function(_function(rest), name)
    if kind == "hf" and rest:
        from ssah.evaluation.judges.classifier import classifier

        return classifier(rest)
    if kind == "openai" and rest:
        from ssah.evaluation.judges.endpoint import Endpoint

        return Endpoint.parse(rest)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"judge is {name!r}, which is no file")
        return Keywords.load(name)
    raise ValueError(f"judge is {name!r}, must be one of {judge_names()}, or a function")


def judge_names() -> str:
    """What may name a judge, for messages."""
    return ", ".join(
        [*KEYWORDS, "FILE.json", "hf:MODEL", "openai:URL#MODEL", "python:module.function"]
    )


def _function(path: str) -> Judged:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"judge is 'python:{path}', must be 'python:module.function'")
    here = os.getcwd()
    sys.path.insert(0, here)  # a script of one's own lies there; a console command has its own path
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"judge is 'python:{path}', but {error} (sought in {here})") from error
    finally:
        sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"judge is 'python:{path}', but {module_name} has no function {name!r}")
    found: Judged = function
    return found
