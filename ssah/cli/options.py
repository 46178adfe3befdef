"""Options of a command, generated from the settings that its function takes.

An example: the function of a command ::

    def scan(model: Model, out: Out, settings: ScanSettings) -> Result: ...

has the options of ``Model`` and ``Out`` and one for each `setting` of ``ScanSettings``, by its
name, type, default, help and bounds. It is called with a ``ScanSettings`` of what was given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, is_dataclass
from enum import Enum
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from ssah.settings import HELP, choices_of, declared


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with options in place of its arguments whose type is a settings dataclass."""
    parameters: list[inspect.Parameter] = []
    made: dict[str, tuple[Any, dict[str, str]]] = {}  # argument -> its class, option -> field
    for argument in inspect.signature(function, eval_str=True).parameters.values():
        kind = argument.annotation
        if not is_dataclass(kind):
            if get_origin(kind) is Annotated:
                hint, option = get_args(kind)
                kind = Annotated[_known_to_typer(hint), option]
            # By keyword, as an option without a default may follow one that has one.
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(argument.replace(kind=keyword, annotation=kind))
            continue
        fields = [each for each in declared(kind) if HELP in each[2]]  # type: ignore[arg-type]
        # Two classes may have a field of one name, as --batch-size and --train-batch-size do.
        names = {f"{argument.name}_{own.name}": own.name for own, _, _ in fields}
        parameters += [_parameter(name, *each) for name, each in zip(names, fields, strict=True)]
        made[argument.name] = kind, names

    @functools.wraps(function)
    def run(**given: Any) -> Any:
        values = {name: _plain(value) for name, value in given.items()}
        for argument, (kind, names) in made.items():
            own = {field: values.pop(name) for name, field in names.items()}
            lists = {field: tuple(value) for field, value in own.items() if isinstance(value, list)}
            # None and an empty list were not given: the field has its default.
            values[argument] = kind(
                **{field: v for field, v in (own | lists).items() if v is not None and v != ()}
            )
        return function(**values)

    # typer reads the options from the signature.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(
    name: str, field: Field[Any], hint: Any, about: Mapping[str, Any]
) -> inspect.Parameter:
    """The option of one field, as typer reads it from a signature."""
    spelled = about.get("option", "--" + field.name.replace("_", "-"))
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    if get_origin(hint) is tuple:
        # typer knows lists. The option's own default is none: the field has the real one.
        hint = _known_to_typer(list[_element(hint)])  # type: ignore[misc]
        if field.default is not MISSING:
            hint, default = hint | None, None
    elif hint == bool | None or default is True:  # there must be an option to say no
        spelled += f"/--no-{spelled.removeprefix('--')}"
    option = typer.Option(
        *spelled.split(),
        help=about[HELP],
        rich_help_panel=about.get("panel"),
        metavar=about.get("metavar"),
        # typer knows no bound that is out of the range itself: check_settings refuses that.
        min=about.get("min"),
        max=about.get("max"),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )


def _element(hint: Any) -> Any:
    """``X`` of ``tuple[X, ...]`` and of ``tuple[X | None, ...]``: nobody can type None."""
    each = get_args(hint)[0]
    known = [part for part in get_args(each) if part is not NoneType]
    return known[0] if NoneType in get_args(each) else each


def _known_to_typer(hint: Any) -> Any:
    """The same with ``list[Literal]`` as a list of an Enum: typer knows a Literal, but no list."""
    choices = choices_of(hint)
    if get_origin(hint) is list and choices:
        return list[Enum("Choice", {name: name for name in choices}, type=str)]  # type: ignore[misc]
    parts = get_args(hint)
    return _known_to_typer(parts[0]) | None if NoneType in parts and choices else hint


def _plain(value: Any) -> Any:
    """What typer made of a list of choices, as their names."""
    if isinstance(value, list):
        return [each.value if isinstance(each, Enum) else each for each in value]
    return value
