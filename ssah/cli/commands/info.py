"""``ssah info``."""

from __future__ import annotations

from typing import Annotated

import typer

from ssah.cli.running import Result

ORDER = 130


def info(
    model: Annotated[
        str | None,
        typer.Option("--model", help="What of this model would be scored; no weights are read."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> Result:
    """Show versions, instruction sets, GPU architectures, and the backends of every operator.

    With `--model`: which modules of a model hold units, how many, and what is not covered and why,
    from its configuration alone.

    Example: `ssah info --model smollm2`
    """
    from ssah.info import describe, describe_model
    from ssah.models import empty_model, quiet
    from ssah.report.terminal import installation_tables, model_tables

    facts = describe()
    if model is None:
        return Result(facts, tuple(installation_tables(facts)))
    with quiet():  # transformers would warn of weights that nobody wants to load
        empty = empty_model(model, trust_remote_code=trust_remote_code)
    facts["model"] = describe_model(empty, model)
    return Result(facts, tuple(model_tables(facts["model"])))
