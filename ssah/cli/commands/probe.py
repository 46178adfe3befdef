"""``ssah probe``."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import Model, Out, Rows, Weights
from ssah.settings import setting

ORDER = 80


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed, as ``ssah.probe`` takes it; None: its default."""

    beside: str | None = setting(None, "Compare with this model.", metavar="OTHER")
    requests: tuple[str, ...] = setting(
        ("builtin:safety_eval",),
        "Harmful: .txt, JSONL or built-in [`builtin:safety_eval`]; repeat.",
    )
    tokens: int = setting(10, "Generated with each version.", min=1)
    refusal: str | None = setting(None, "Start of a refusal; default: that of the margin.")
    compliance: str | None = setting(None, "Start of a compliance.")
    batch_size: int = setting(8, "Rows run at a time.", min=1)
    max_length: int = setting(512, "Tokens kept of a row.", min=2)


def probe(model: Model, out: Out, settings: ProbeSettings, weights: Weights, rows: Rows) -> Result:
    """Measure whether hidden states are nearer to a refusal's or to a compliance's, per layer.

    Example: `ssah probe runs/aligned --beside smollm2 --out runs/probe`
    """
    quiet_threads()
    from ssah.report.terminal import probe_tables
    from ssah.studies import run_probe

    # An opening that was not given is that of the margin, which only the library knows.
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    record = run_probe(out, weights.loading(model, rows), **given)
    return Result({"out": str(out), **record["result"]}, tuple(probe_tables(record, out)))
