"""What all commands share: how they are run, what they print, and how they fail."""

from __future__ import annotations

import dis
import functools
import inspect
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssah.cli.options import with_options
from ssah.cli.out_folders import check_out

if TYPE_CHECKING:
    from rich.console import RenderableType

WRONG_INPUT, FAILED = 2, 1  # exit codes
INTERRUPTED = 130  # what typer ends with where a user interrupts

_JSON = typer.Option("--json", help="Print JSON alone on standard output.")


@dataclass(frozen=True)
class Result:
    """What a command found: plain data for ``--json``, what to print for people, its exit code."""

    data: dict[str, Any]
    shown: tuple[RenderableType, ...] = ()
    code: int = 0


def as_command(function: Callable[..., Result]) -> Callable[..., None]:
    """Make a command of a function: its settings become options, and its result is printed.

    With ``--json`` nothing but the JSON reaches standard output: whatever else is printed on the
    way goes to standard error. An error is one line on standard error; the exit code is 2 for wrong
    input and 1 for anything else. SSAH_TRACEBACK=1 shows the traceback.
    """
    inner = with_options(function)

    @functools.wraps(function)
    def run(*, as_json: bool, **given: Any) -> None:
        # For this call alone: tests and notebooks call commands in their own process.
        usual, warnings.formatwarning = warnings.formatwarning, _warning
        try:
            check_launcher()
            check_out(signature, given)
            # Other libraries print while they load: a program that reads the JSON must not see it.
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                result = inner(**given)
            _print(result, as_json)
            if result.code:
                raise typer.Exit(result.code)
        except Exception as error:
            _stop(error)
        finally:
            warnings.formatwarning = usual

    parameters = [
        *inspect.signature(inner).parameters.values(),
        inspect.Parameter(
            "as_json",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, _JSON],
        ),
    ]
    # typer reads the options from the signature; the result is printed, not returned.
    signature = inspect.Signature(parameters)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def quiet_threads() -> None:
    """Let threads that wait leave their core to others, which is faster on a busy machine.

    To be called before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# ------------------------------------------------------------------------------------- errors


def _stop(error: Exception) -> None:
    """End the command with one line of error."""
    # typer ends commands by errors of its own, when it has said what there is to say.
    if isinstance(error, typer.Exit | typer.Abort) or os.environ.get("SSAH_TRACEBACK", "0") == "1":
        raise error
    wrong_input = isinstance(error, ValueError | TypeError | OSError)
    line, code = str(error), WRONG_INPUT if wrong_input else FAILED
    if not is_meant(error):
        where = "SSAH_TRACEBACK=1 shows where; please report it"
        line, code = f"{type(error).__name__}: {error} (a fault of ssah: {where})", FAILED
    typer.echo(f"error: {' '.join(line.split()) or type(error).__name__}", err=True)
    raise typer.Exit(code)


def is_meant(error: Exception) -> bool:
    """Whether an error tells its user something, rather than that the library has a mistake.

    ``raise TypeError("judge returned a str, must return a bool")`` is meant. ``None + 1`` is not,
    though it is a TypeError too: it arose in this library, and not at a ``raise``.
    """
    if isinstance(error, OSError | RuntimeError | ArithmeticError | ImportError):
        return True  # a file, memory, a package: what is amiss may lie outside
    trace = error.__traceback__
    if trace is None or not isinstance(error, ValueError | TypeError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    if frame.f_globals.get("__name__", "").split(".")[0] in ("ssah", "ssah_kernels"):
        return dis.opname[frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    # Other libraries refuse a user's files by ValueError; a TypeError says how they were called.
    return isinstance(error, ValueError)


def _warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """How a warning is told: what it says, on one line; where it arose matters for other kinds."""
    name = "" if category is UserWarning else f"{category.__name__}: "
    return f"warning: {name}{' '.join(str(message).split())}\n"


def check_launcher() -> None:
    """Refuse the environment of a launcher that says half of what it must.

    Raises:
        ValueError: a variable is no number, or RANK is there without WORLD_SIZE: then this process
            would neither find the others nor print.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank >= size:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE is {os.environ.get('WORLD_SIZE') or 'not set'}, must "
            "be more than RANK: start the command with torchrun, or unset RANK"
        )


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable) or str(otherwise)
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{variable} is {text!r}, must be a number of processes: unset it")
    return int(text)


# ------------------------------------------------------------------------------------- output


def _print(result: Result, as_json: bool) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a narrow encoding, what it lacks is replaced
        sys.stdout.reconfigure(errors="replace")
    if _number("RANK", 0) != 0:
        return  # of the processes that a launcher started, the first one prints
    if as_json:
        # NaN is no JSON, and most readers refuse it: a result with one is a mistake to be seen.
        typer.echo(json.dumps(result.data, indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)  # else numbers within the names of files have colours
    for part in result.shown:
        console.print(part)
