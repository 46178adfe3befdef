"""The tables of ``ssah finetune`` and ``ssah align``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.terminal.tables import facts_table

if TYPE_CHECKING:
    from rich.table import Table


def preview_table(result: dict[str, Any], batch_size: int) -> Table:
    """What would train, and the memory that it would take."""
    memory = result["memory"]
    facts = {
        "model": result["model"],
        "trained parameters": _parameters(result["parameters"]),
        "weights": _size(memory["weights"]),
        "gradients": _size(memory["gradients"]),
        "optimiser state": _size(memory["optimizer_state"]),
        "activations": f"{_size(memory['activations'])} (at most {batch_size} rows of "
        f"{result['longest_row']} tokens)",
        "estimated peak": Text(_size(memory["peak"]), style="bold"),
    }
    return facts_table("Dry run: nothing was trained or written", facts)


def trained_table(result: dict[str, Any]) -> Table:
    """What a run trained, what it cost, and where it is."""
    facts: dict[str, object] = {
        "model": result["model"],
        "trained parameters": _parameters(result["parameters"]),
        "updates": f"{result['steps']:,}"
        + (f", resumed after {result['resumed_from']:,}" if result["resumed_from"] else ""),
        "loss": f"{result['loss_first']:.4f} -> {result['loss_last']:.4f}",
    }
    if result["eval_loss"] is not None:
        facts["eval loss"] = f"{result['eval_loss_before']:.4f} -> {result['eval_loss']:.4f}"
    if result["safety"] is not None:
        facts |= _safety(result["safety"])
    facts["frozen units"] = "verified: not a bit changed"
    facts["time"] = f"{result['seconds']:.1f} s"
    facts["update saved to"] = result["out"]
    if result["merged"]:
        facts["model saved to"] = result["merged"]
    title = "Finished earlier; not trained again" if result["already_finished"] else "Trained"
    return facts_table(title, facts)


def _safety(safety: dict[str, Any]) -> dict[str, str]:
    """What the model refuses before and after, and the change with its interval."""
    before, after, change = (safety[when] for when in ("before", "after", "change"))
    judge, facts = safety["asked"]["judge"]["name"], {}
    for key, name in (
        ("refused", f"harmful requests refused ({judge})"),
        ("over_refused", "harmless ones refused"),
        ("empty_or_repeating", "empty or repeating answers"),
    ):
        if before[key] is not None:
            shown = [f"{each[key]['rate']:.1%}" for each in (before, after)]
            facts[name] = f"{' -> '.join(shown)} of {before[key]['n']}"
            facts[name] += _change(change.get(key), 100, "points")
    shown = [f"{each['refusal_margin']:+.3f}" for each in (before, after)]
    facts["refusal margin"] = " -> ".join(shown) + _change(change["refusal_margin"], 1, "nats")
    return facts


def _change(change: dict[str, Any] | None, factor: float, unit: str) -> str:
    if change is None:
        return ""
    value, low, high = (factor * each for each in (change["change"], *change["interval"]))
    digits = 1 if factor > 1 else 3
    return f" ({value:+.{digits}f} {unit} [{low:+.{digits}f}, {high:+.{digits}f}])"


def _parameters(parameters: dict[str, Any]) -> str:
    return f"{parameters['trained']:,} of {parameters['all']:,} ({parameters['share']:.2%})"


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
