"""No command writes its result into the folder of a model that it reads.

For example, ``ssah compare runs/aligned --out runs/aligned/compare`` is refused: whoever copies or
publishes the model would take the result along, and whoever removes the result may take the model.
All models count alike, as ``--base``, ``--unaligned`` and BEFORE do, whatever a command calls them:
they are known by what their folders hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from typer.models import OptionInfo


def check_out(signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    """Refuse a result in the folder of a model, before a command does anything.

    Args:
        signature: of the command, as typer reads it.
        given: the values of its parameters by name.

    Raises:
        ValueError: the folder for the result is that of a model among the values, or lies in it.
    """
    for parameter in signature.parameters.values():
        out = given.get(parameter.name)
        if out is None or not _is_out(parameter):
            continue
        # The result itself may be a model, and a finished run be asked for again.
        others = (value for key, value in given.items() if key != parameter.name)
        for name in _texts(others):
            folder = Path(name).resolve()
            if folder in (own := Path(out).resolve(), *own.parents) and _holds_model(folder):
                where = "is" if own == folder else "lies in"
                raise ValueError(
                    f"out is {str(out)!r}, which {where} the folder of the model {name!r}; it must "
                    "be a folder elsewhere"
                )


def _is_out(parameter: inspect.Parameter) -> bool:
    """Whether it is ``--out DIR``. Where it is a file, a report for one, it may be anywhere."""
    # typer keeps the first spelling of an option that is annotated where its default would be.
    return any(
        "--out" in (option.default, *(option.param_decls or ())) and option.metavar == "DIR"
        for option in get_args(parameter.annotation)[1:]
        if isinstance(option, OptionInfo)
    )


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _texts(value)
        elif isinstance(value, str | Path) and str(value):  # an empty text would be this folder
            yield str(value)


def _holds_model(folder: Path) -> bool:
    """Whether it has a model, an adapter or an update."""
    from ssah.training import is_update

    named = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return named or any(folder.glob("*.gguf")) or is_update(str(folder))
