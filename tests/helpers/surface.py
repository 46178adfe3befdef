"""What a user can name: public modules, their names with parameters, commands with their options.

After a change that was meant, write the list anew:
``python tests/helpers/surface.py > tests/helpers/surface.txt``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import typer
from commands import commands

from ssah.cli import app

# Import paths that documentation shows: they go on working when files move.
PUBLIC = (
    "ssah",
    "ssah.interventions",
    "ssah.attribution",
    "ssah.data",
    "ssah.deltas",
    "ssah.deltas.subspaces",
    "ssah.distributed",
    "ssah.evaluation",
    "ssah.evaluation.tasks",
    "ssah.training.finetune",
    "ssah.groups",
    "ssah.info",
    "ssah.training.finetune.memory",
    "ssah.methods",
    "ssah.models",
    "ssah.representations",
    "ssah.selections",
    "ssah.evaluation.probing",
    "ssah.attribution.streaming",
    "ssah.training",
    "ssah.units",
    "ssah_kernels",
    "ssah_kernels.ops",
    "ssah_kernels.optim",
)


def _parameters(value: Any) -> str:
    """Names and defaults; annotations are checked elsewhere. Empty where nothing can be called."""
    if inspect.isclass(value) and not {"__init__", "__new__"} & vars(value).keys():
        return ""  # an inherited signature belongs to another library and its version
    if not callable(value):
        return ""
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # a type alias
        return ""
    return str(
        inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in found])
    )


def _members(owner: str, value: Any) -> Iterator[str]:
    """Public methods and fields that a class adds to those of its bases.

    PyTorch puts a ``step`` of its own into the class of an optimiser when one is first made.
    """
    # What a base of ours has is public too: a class may be in several files.
    parts = [c for c in value.__mro__[1:] if c.__module__.startswith("ssah.")]
    own = {name for each in (value, *parts) for name in vars(each)}
    inherited = {name for c in value.__mro__[1:] if c not in parts for name in vars(c)}
    for member in sorted(own - inherited):
        if not member.startswith("_"):
            yield f"{owner}.{member}{_parameters(getattr(value, member))}"


def _names() -> Iterator[str]:
    for module in PUBLIC:
        imported = importlib.import_module(module)
        for name in sorted(imported.__all__):
            value = getattr(imported, name)
            yield f"{module}.{name}{_parameters(value)}"
            # ssah.UnitSet and ssah.units.UnitSet are one class: its members stand once.
            if inspect.isclass(value) and module != "ssah" and value.__module__.startswith("ssah"):
                yield from _members(f"{module}.{name}", value)


def _commands() -> Iterator[str]:
    for words, command in sorted(commands(typer.main.get_command(app))):
        for parameter in command.params:
            spelled = "/".join([*parameter.opts, *parameter.secondary_opts])
            default = getattr(parameter.default, "value", parameter.default)  # of an Enum
            if default in ((), []):
                default = None  # releases of typer differ
            shown = "required" if parameter.required else f"= {default!r}"
            several = " ..." if getattr(parameter, "multiple", False) else ""
            yield f"ssah {' '.join(words)} {spelled}{several} {shown}"


def surface() -> list[str]:
    """One line for each thing that a user can name."""
    return [*_names(), *_commands()]


if __name__ == "__main__":
    print("\n".join(surface()))
