"""What all commands share: their options, their output and their errors."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Parameters = ParamSpec("Parameters")
Item = TypeVar("Item")

WRONG_INPUT, FAILED = 2, 1  # exit codes


class Metric(str, Enum):
    """As ``ssah.attribution.METRICS``."""

    variance = "variance"
    norm = "norm"
    taylor = "taylor"
    fisher = "fisher"


class Tokens(str, Enum):
    """As ``ssah.attribution.TOKENS``."""

    auto = "auto"
    all = "all"
    after_first = "after_first"
    labels = "labels"


class Modules(str, Enum):
    """As ``ssah.units.KINDS``."""

    mlp = "mlp"
    attention = "attention"


class Group(str, Enum):
    """As ``ssah.groups.GROUPS``."""

    scu = "scu"
    ucu = "ucu"
    ru = "ru"
    cu = "cu"


class Scope(str, Enum):
    """As ``ssah.groups.SCOPES``."""

    module = "module"
    model = "model"


class Normalize(str, Enum):
    """As ``ssah.groups.NORMALIZATIONS``."""

    none = "none"
    zscore = "zscore"
    rank = "rank"


class Dtype(str, Enum):
    """As ``ssah.models.DTYPES``."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf, hub id or `smollm2`.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Weights; `auto`: as stored.")]
Device = Annotated[str, typer.Option("--device", help="`auto`: a GPU if there is one.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows run at a time.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, help="Tokens kept of a row.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Rows read.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the random units.")]
Packed = Annotated[
    bool, typer.Option("--packed", help="Keep a .gguf in its blocks: less memory, slower.")
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


@dataclass(frozen=True)
class Result:
    """What a command found: plain data for ``--json``, and what to print for people."""

    data: dict[str, Any]
    shown: tuple[RenderableType, ...] = ()


def reporting(function: Callable[Parameters, Result]) -> Callable[Parameters, None]:
    """Make a command of a function that has an ``as_json`` argument and returns a result.

    With ``--json`` nothing but the JSON reaches standard output: whatever else is printed on the
    way goes to standard error. An error is one line on standard error; the exit code is 2 for wrong
    input and 1 for anything else. SSAH_TRACEBACK=1 shows the traceback.
    """

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        as_json = bool(kwargs["as_json"])
        usual, warnings.formatwarning = warnings.formatwarning, _warning
        try:
            check_launcher()
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                result = function(*args, **kwargs)
            _print(result, as_json)
        except (ValueError, TypeError, OSError) as error:
            _stop(error, WRONG_INPUT)
        except (RuntimeError, ArithmeticError, ImportError) as error:
            _stop(error, FAILED)
        except Exception as error:  # of a kind that no part of the library means to raise
            kind = type(error).__name__
            where = "SSAH_TRACEBACK=1 shows where; please report it"
            _stop(RuntimeError(f"{kind}: {error} (a fault of ssah: {where})"), FAILED)
        finally:
            warnings.formatwarning = usual

    # typer reads the options from the signature; the result is printed, not returned.
    run.__annotations__ = {**function.__annotations__, "return": "None"}
    return run


def _warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """How a warning is told: what it says, on one line; where it arose matters for other kinds."""
    name = "" if category is UserWarning else f"{category.__name__}: "
    return f"warning: {name}{' '.join(str(message).split())}\n"


def _stop(error: Exception, code: int) -> None:
    if os.environ.get("SSAH_TRACEBACK", "0") == "1":
        raise error
    line = " ".join(str(error).split()) or type(error).__name__
    typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code)


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


def _print(result: Result, as_json: bool) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a narrow encoding, what it lacks is replaced
        sys.stdout.reconfigure(errors="replace")
    if _number("RANK", 0) != 0:
        return  # of the processes that a launcher started, the first one prints
    if as_json:
        typer.echo(json.dumps(result.data, indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in result.shown:
        console.print(part)


def load(
    name: str, dtype: Dtype, device: str, trust_remote_code: bool, *, packed: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, with a spinner on standard error meanwhile."""
    from rich.console import Console

    from ssah.models import load_model, quiet
    from ssah.report.terminal.tables import as_data

    with Console(stderr=True).status(f"loading {as_data(name)}"), quiet():
        return load_model(
            name,
            dtype=dtype.value,
            device=device,
            trust_remote_code=trust_remote_code,
            packed=packed,
        )


def following(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """``items``, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, total=total, console=Console(stderr=True), transient=True)
