"""Settings that are declared once: fields of a dataclass, of which commands make their options.

An example::

    @dataclass(frozen=True)
    class ScanSettings:
        draws: int = setting(1, "Sets of random units.", panel="Groups", min=1)

        def __post_init__(self) -> None:
            check_settings(self)

is ``--draws INTEGER RANGE [x>=1]`` of ``ssah scan``, and ``ScanSettings(draws=0)`` is refused.
Nothing heavy is imported here: the commands read settings before they import torch.
"""

from __future__ import annotations

import math
from dataclasses import Field, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

HELP = "help"  # key of the metadata that makes an option of a field
_BOUNDS = {  # key -> how a message says it, and whether a value keeps to it
    "above": ("greater than", lambda value, bound: value > bound),
    "min": ("at least", lambda value, bound: value >= bound),
    "below": ("less than", lambda value, bound: value < bound),
    "max": ("at most", lambda value, bound: value <= bound),
}


def setting(
    default: Any,
    help: str,
    *,
    option: str | None = None,
    panel: str | None = None,
    metavar: str | None = None,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a settings dataclass that is an option of a command.

    Args:
        default: of the field; ``MISSING`` of dataclasses where it must be given.
        help: what ``--help`` says of it, in Markdown.
        option: how it is spelled, where that is not the field's name: ``"--judge"``.
        panel: heading in ``--help`` under which it stands.
        metavar: what stands for its value in ``--help``.
        min, max, above, below: bounds of a number, or of each number of a tuple, see
            `check_settings`; the last two exclude the bound itself.
    """
    bounds = {"min": min, "max": max, "above": above, "below": below}
    about = {HELP: help, "option": option, "panel": panel, "metavar": metavar, **bounds}
    # What was not said is left out, so that `declared` finds what a base class said of it.
    given = {key: value for key, value in about.items() if value is not None}
    return field(default=default, metadata=given)


def declared(settings: type) -> list[tuple[Field[Any], Any, dict[str, Any]]]:
    """Each field of a settings dataclass with its type, and with what `setting` was told.

    A subclass that only changes a default keeps what its base says of the field.
    """
    # Types are text here, as in every file of this package: they are looked up.
    hints, found = get_type_hints(settings), []
    for own in fields(settings):
        about: dict[str, Any] = {}
        for base in reversed(settings.__mro__):  # the base first: a subclass overrides it
            kept = vars(base).get("__dataclass_fields__", {}).get(own.name)
            about |= {} if kept is None else kept.metadata
        found.append((own, hints[own.name], about))
    return found


def check_settings(settings: Any) -> None:
    """Refuse a number that is not finite or out of bounds, or what is not among the choices.

    Raises:
        ValueError: it names the field, the value and what it must be. A tuple whose default has
            something in it must not be empty.
    """
    for own, hint, about in declared(type(settings)):
        given, choices = getattr(settings, own.name), choices_of(hint)
        several = isinstance(given, tuple)
        if several and own.default and not given:
            raise ValueError(f"{own.name} is empty; it must have at least one value")
        for value in given if several else (given,):
            # A field of Literal | None may be None, and so may system prompts among others.
            if choices and value is not None and value not in choices:
                must = "one or more of" if several else "one of"
                raise ValueError(f"{own.name} is {value!r}; it must be {must} {', '.join(choices)}")
            _check_bounds(own.name, value, {key: about[key] for key in _BOUNDS if key in about})


def _check_bounds(name: str, value: Any, bounds: dict[str, float]) -> None:
    must = [f"{_BOUNDS[key][0]} {bound}" for key, bound in bounds.items()]
    # NaN is in no range, and infinity in every one that has no end; no record can hold either.
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be {' and '.join(['finite', *must])}")
    if must and value is not None and not all(_BOUNDS[k][1](value, b) for k, b in bounds.items()):
        raise ValueError(f"{name} is {value!r}; it must be {' and '.join(must)}")


def check_number(name: str, value: float) -> None:
    """Refuse what weights or hidden states cannot be multiplied by.

    Raises:
        TypeError: it is no number; it is named.
        ValueError: it is NaN or infinite.
    """
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {type(value).__name__}, must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, must be a finite number")


def choices_of(hint: Any) -> tuple[str, ...]:
    """Names of the ``Literal`` that a type is, or is made of: none where there is no such type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(name for part in get_args(hint) for name in choices_of(part))
