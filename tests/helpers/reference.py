"""Pages of the site that are made from the code: the commands, and one for each public module.

An option such as ``limit: int | None = setting(None, "Rows read.", min=1)`` of ``ssah attribute``
becomes the row ``| `--limit` | Rows read. | |`` below the heading ``## `ssah attribute` ``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from commands import commands
from surface import PUBLIC

from ssah.cli import app

_COMMANDS = """# Commands, one by one

What `ssah COMMAND --help` prints, of all commands. [Command line](../cli.md) says what each is for,
what they share, and how they follow each other.
"""


def api_pages() -> dict[str, str]:
    """Each public module, and the page where the site shows it."""
    return {module: f"reference/{module}.md" for module in PUBLIC}


def api_page(module: str) -> str:
    """What a public module lists in ``__all__``, by its docstrings (mkdocstrings fills it in)."""
    imported = importlib.import_module(module)
    lines = [f"# {module}", (imported.__doc__ or "").strip()]
    for name in sorted(imported.__all__):
        # A room within the library is no member: it has a page of its own, or none.
        if f"{module}.{name}" not in PUBLIC:
            lines += [f"::: {module}.{name}\n    options: {{show_root_heading: true}}"]
    return "\n\n".join(lines) + "\n"


def commands_page() -> str:
    """Every command, in the order of ``ssah --help``, with its arguments and options."""
    lines = [_COMMANDS]
    for words, command in commands(typer.main.get_command(app)):
        lines += [f"## `ssah {' '.join(words)}`", _help(command), "\n".join(_table(command))]
    return "\n\n".join(lines) + "\n"


def _help(command: Any) -> str:
    # A form feed ends what `--help` shows, and \b keeps the lines of a paragraph.
    return str(command.help or "").partition("\f")[0].replace("\b\n", "").strip()


def _table(command: Any) -> Iterator[str]:
    yield "| argument or option | what | default |"
    yield "|---|---|---|"
    # Releases of typer keep the type of an option in different places: the function has it in all.
    types = get_type_hints(command.callback, include_extras=True)
    for parameter in command.params:
        if "--help" not in parameter.opts:
            choices = list(_choices(types[parameter.name]))
            cells = (f"`{_spelled(parameter)}`", _what(parameter, choices), _default(parameter))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _choices(annotation: Any) -> Iterator[str]:
    """The values of ``Literal["a", "b"]``, of an Enum, and of a list of either."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        yield from (str(each.value) for each in annotation)
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for each in get_args(annotation):
            yield from _choices(each)


def _spelled(parameter: Any) -> str:
    spelled = "/".join([*parameter.opts, *parameter.secondary_opts])
    if not spelled.startswith("-"):
        return str(parameter.metavar or spelled).upper()
    return f"{spelled} {parameter.metavar}" if parameter.metavar else spelled


def _what(parameter: Any, choices: list[str]) -> str:
    listed = "One of " + ", ".join(f"`{each}`" for each in choices) + "." if choices else ""
    text = " ".join(str(parameter.help or "").split())
    repeats = getattr(parameter, "multiple", False) and "epeat" not in text
    several = "May be repeated." if repeats else ""
    return " ".join(filter(None, (text, listed, several)))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = getattr(parameter.default, "value", parameter.default)  # of an Enum
    if value is None or value is False or value in ((), []):
        return ""
    values = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(f"`{getattr(each, 'value', each)}`" for each in values)
