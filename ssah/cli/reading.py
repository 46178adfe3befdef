"""The options by which every command that reads rows says how it reads and renders them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import typer

__all__ = ["reading_rows"]

_PANEL = "Rows and template"


class Overlong(str, Enum):
    """As ``ssah.data.encode`` takes it."""

    cut = "cut"
    skip = "skip"
    error = "error"


def _option(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=_PANEL, **more)


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "prompt_column": (
        Annotated[str | None, _option("--prompt-column", "Where the prompt stands.")],
        None,
    ),
    "response_column": (
        Annotated[str | None, _option("--response-column", "Where the response stands.")],
        None,
    ),
    "skip_invalid": (
        Annotated[
            bool,
            _option("--skip-invalid", "Leave empty and unreadable rows out, and count them."),
        ],
        False,
    ),
    "overlong": (
        Annotated[
            Overlong,
            _option(
                "--overlong",
                "Rows beyond --max-length: `cut` the response; `skip`: leave rows out whose "
                "prompt alone is too long; `error`.",
            ),
        ],
        Overlong.cut,
    ),
    "template": (
        Annotated[
            str | None,
            _option("--template", "Chat template in place of the model's.", metavar="FILE|NAME"),
        ],
        None,
    ),
    "template_option": (
        Annotated[
            list[str] | None,
            _option(
                "--template-option",
                "For the chat template, `enable_thinking=false`; its date: "
                "`strftime_now=2024-07-26`. May be repeated.",
                metavar="KEY=VALUE",
            ),
        ],
        None,
    ),
}


def reading_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of how it reads and renders rows.

    Its argument ``reading`` becomes the `ssah.data.Reading` that they make.
    """

    @functools.wraps(function)
    def run(**given: Any) -> Any:
        from ssah.data import Reading, template_options

        own = {name: given.pop(name) for name in _OPTIONS}
        reading = Reading(
            prompt_column=own["prompt_column"],
            response_column=own["response_column"],
            invalid="skip" if own["skip_invalid"] else "error",
            overlong=own["overlong"].value,
            template=own["template"],
            template_options=template_options(own["template_option"] or ()),
        )
        return function(reading=reading, **given)

    signature = inspect.signature(function, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.name != "reading"]
    parameters += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=annotation,
        )
        for name, (annotation, default) in _OPTIONS.items()
    ]
    # typer reads the options from the signature.
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
