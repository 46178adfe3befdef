"""A judge by its name. A new kind of judge is one file beside this one, and one line in `KINDS`."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from pathlib import Path

from ssah.evaluation.judges.base import Judge
from ssah.evaluation.judges.function import Function, Judged
from ssah.evaluation.judges.keywords import KEYWORDS, Keywords

# ``hf:MODEL`` is what ``classifier`` in that module makes of ``MODEL``. The modules are named, not
# imported: most users want a list of keywords, and not the classes of transformers.
KINDS: dict[str, tuple[str, str]] = {
    "hf": ("MODEL", "ssah.evaluation.judges.classifier:classifier"),
    "openai": ("URL#MODEL", "ssah.evaluation.judges.endpoint:Endpoint.parse"),
    "python": ("module.function", "ssah.evaluation.judges.function:Function.parse"),
}


def judge(name_or_callable: str | Judge | Judged) -> Judge:
    """The judge that is meant.

    Args:
        name_or_callable: a judge, a name as ``ssah.evaluation.judges`` lists them, or a function of
            request and answer that returns True where the attack succeeded.

    Raises:
        ValueError: no such judge; the message lists those that there are.
        TypeError: neither a string nor callable.
        FileNotFoundError: a name that ends in ``.json`` is no file.
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
    kind, _, what = name.partition(":")
    if kind in KINDS and what:
        module, _, maker = KINDS[kind][1].partition(":")
        made: Judge = attrgetter(maker)(import_module(module))(what)
        return made
    if name in KEYWORDS:
        return Keywords.load(name)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"judge is {name!r}, which is no file")
        return Keywords.load(name)
    raise ValueError(f"judge is {name!r}, must be one of {judge_names()}, or a function")


def judge_names() -> str:
    """What may name a judge, for messages."""
    kinds = (f"{kind}:{what}" for kind, (what, _) in KINDS.items())
    return ", ".join([*KEYWORDS, "FILE.json", *kinds])
