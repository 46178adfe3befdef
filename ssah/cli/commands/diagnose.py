"""``ssah diagnose``."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass

from ssah.choices import Dtype
from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import Model, Out, Rows, Weights
from ssah.settings import setting

ORDER = 85


@dataclass(frozen=True)
class DiagnoseSettings:
    """What is compared, and on which rows."""

    before: str = setting(
        MISSING, "The model before alignment.", metavar="MODEL", option="--unaligned"
    )
    safety: str = setting("builtin:safety", "Harmful requests with refusals.", panel="Data")
    utility: str = setting("builtin:utility", "Ordinary instructions with answers.", panel="Data")
    requests: tuple[str, ...] = setting(
        ("builtin:safety_eval",), "Harmful, for the margin; repeat.", panel="Data"
    )
    utility_eval: str = setting("builtin:utility_eval", "Rows for the utility loss.", panel="Data")
    alphas: tuple[float, ...] = setting(
        (0.0, 0.5, 1.0, 1.5, 2.0), "How far from before to aligned; repeat.", option="--alpha"
    )
    energy: float = setting(0.9, "Share of the energy that counts in the overlap.", above=0, max=1)
    seed: int = setting(0, "Of the random change.", min=0)
    batch_size: int = setting(8, "Rows run at a time.", min=1)
    max_length: int = setting(512, "Tokens kept of a row.", min=2)


@dataclass(frozen=True)
class WholeWeights(Weights):
    """Weights of models whose difference is looked at: 16 bits would round it away."""

    dtype: Dtype = setting("auto", "`auto`: float32.")


def diagnose(
    model: Model, out: Out, settings: DiagnoseSettings, weights: WholeWeights, rows: Rows
) -> Result:
    """Show what alignment changed: where requests part, and how far it can be turned up.

    Example: `ssah diagnose runs/aligned --unaligned smollm2 --out runs/diagnosis`
    """
    quiet_threads()
    from ssah.report.terminal import diagnosis_tables
    from ssah.studies import diagnose as run

    record = run(out, weights.loading(model, rows), **asdict(settings))
    return Result({"out": str(out), **record["result"]}, tuple(diagnosis_tables(record, out)))
