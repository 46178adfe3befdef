"""A method from what somebody typed: ``interpolation`` and ``alpha=0.25``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import NoneType
from typing import Any, get_args

from ssah.methods.frame import Method
from ssah.methods.registry import describe, method, setting_types
from ssah.settings import choices_of


def typed_method(name: str, texts: Sequence[str]) -> Method:
    """A method with settings as text.

    Example: ``typed_method("interpolation", ["alpha=0.25"])``.

    Args:
        name: of `ssah.methods.names`.
        texts: ``NAME=VALUE`` each; ``none`` stands for None.

    Raises:
        ValueError: there is no such method or setting, or a value is none of its type or out of its
            bounds.
    """
    types = setting_types(name)
    given: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            known = [each["name"] for each in describe(name)["settings"]]
            raise ValueError(
                f"set is {text!r}; it must be NAME=VALUE, with a setting of {name!r}: "
                f"{', '.join(known) or 'it has none'}"
            )
        if key in given:
            raise ValueError(f"set has {key!r} twice; it must have each setting once")
        # An unknown setting is refused by name below.
        given[key] = _value(key, value, types[key]) if key in types else value
    return method(name, **given)


def _value(key: str, text: str, hint: Any) -> Any:
    """The value that a text stands for, of the type of a setting."""
    kinds = get_args(hint) or (hint,)
    if NoneType in kinds and text == "none":
        return None
    if str in kinds or choices_of(hint):
        return text
    if bool in kinds:
        if text in ("true", "false"):
            return text == "true"
        raise ValueError(f"{key} is {text!r}; it must be true or false")
    kind = int if int in kinds else float
    try:
        value = kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key} is {text!r}; it must be {what}") from error
    if not math.isfinite(value):
        raise ValueError(f"{key} is {text!r}; it must be finite")
    return value
