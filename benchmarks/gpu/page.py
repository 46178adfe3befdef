"""The page of a record: what was asked of the GPU side beside what was reached, then all tables.

What was not measured, or failed, is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.scope import CAPTURED, SAMPLES, SECOND_DEVICE, SIDE_STREAM
from benchmarks.gpu.targets import TARGETS

OF_OPERATORS = (*SAMPLES, SIDE_STREAM, SECOND_DEVICE, CAPTURED)
Record = Mapping[str, Any]
Done = Mapping[str, Mapping[str, Any]]  # a stage's pieces


def page(record: Record) -> str:
    """Markdown."""
    parts = [
        ["# On a GPU: what was measured", *about(record)],
        ["## What was asked, and what was reached", *targets(record)],
        ["## The stages", *stages(record)],
        ["## Correctness", *correctness(done(record, "correctness"))],
        ["## Operators", *operators(done(record, "operators"))],
        ["## A step of AdamW", *optimisers(done(record, "optimisers"))],
        ["## Scoring", *scoring(done(record, "attribute"))],
        ["## A training step", *training(done(record, "training"))],
    ]
    return "\n\n".join(block for part in parts for block in part) + "\n"


def done(record: Record, stage: str) -> Done:
    found: Done = record["stages"].get(stage, {}).get("done", {})
    return found


def serving(record: Record) -> Mapping[str, str]:
    """Why each backend does not serve the device, the preferred one first; "" if it does."""
    found: Mapping[str, str] = done(record, "info").get("backends", {})
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(record: Record) -> Iterator[str]:
    """What made the page, and what the figures depend on."""
    yield "```bash\nruns/gpu.sh\n```"
    if record["facts"]["dry_run"]:
        yield "**A dry run on the CPU, with tiny tensors: no figure here says anything of a GPU.**"
    machine = done(record, "info").get("machine", {})
    facts = {
        "device": machine.get("device", "not known"),
        "compute capability": machine.get("capability"),
        "driver": machine.get("driver"),
        "commit": record["facts"]["commit"],
        **done(record, "info").get("versions", {"torch": record["facts"]["torch"]}),
        "libraries": done(record, "install").get("libraries", {}).get("how"),
        **{f"backend `{name}`": why or "serves" for name, why in serving(record).items()},
    }
    yield table(("", ""), [(name, str(value)) for name, value in facts.items() if value])
    yield (
        "Times are medians of interleaved rounds over inputs that rotate. A share is of the "
        "bandwidth of a device copy in the same rounds, counting what it reads and what it writes."
    )


def targets(record: Record) -> Iterator[str]:
    """Each with what the preferred backend reached; a dry run reaches nothing."""
    dry = record["facts"]["dry_run"]
    backend = next((name for name, why in serving(record).items() if not why), "")
    rows = []
    for each in TARGETS:
        reached = None if dry else each.reached(done(record, each.stage), backend)
        value = "not measured" if reached is None else f"{reached:.2f}"
        met = "" if reached is None else "yes" if each.met(reached) else "**no**"
        rows.append((each.what, each.asked, value, met))
    yield table(("", "asked", "reached", "met"), rows)


def stages(record: Record) -> Iterator[str]:
    """How each ended, and what failed."""
    found = record["stages"]
    rows = [
        (
            name,
            stage["status"],
            f"{stage['seconds']:.0f}",
            str(len(stage["done"])),
            str(len(stage["failed"])),
        )
        for name, stage in found.items()
    ]
    yield table(("stage", "", "seconds", "done", "failed"), rows)
    failed = [
        f"* {name}, {piece}: `{one_line(error)}`"
        for name, stage in found.items()
        for piece, error in stage["failed"].items()
    ]
    if failed:
        yield "What failed:\n\n" + "\n".join(failed)
    for name, piece in done(record, "sanitizer").items():
        yield f"compute-sanitizer, {name}: {piece.get('report') or piece['skipped']}"


def one_line(text: str) -> str:
    """The beginning of a message, for a list."""
    flat = " ".join(text.replace("`", "'").split())
    return flat if len(flat) <= 200 else flat[:200] + " ..."


def correctness(found: Done) -> Iterator[str]:
    """A table of the operators with the number of their calls, and a list of the rest."""
    # A name is the backend, the subject and the kind: "cuda gated_moments side stream".
    named = [(*name.split(" ", 2), piece) for name, piece in found.items()]
    kinds = [kind for kind in OF_OPERATORS if any(kind == own for _, _, own, _ in named)]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    rest = []
    for backend, subject, kind, piece in named:
        if kind in OF_OPERATORS:
            cells = rows.setdefault((backend, subject), {})
            cells[kind] = str(piece.get("compared", "-"))
        elif "compared" in piece:
            rest.append(f"{backend} {subject} ({kind})")
    yield "Calls that equal the float64 reference; - where the device or the operator has none."
    yield table(
        ("backend", "", *kinds),
        [(*key, *(cells.get(kind, "") for kind in kinds)) for key, cells in rows.items()],
    )
    yield f"As it must be: {', '.join(rest) or 'nothing was compared'}."


def operators(found: Done) -> Iterator[str]:
    """One row a size: shares, then how often faster the preferred backend is."""
    if not found:
        yield "Nothing was measured."
        return
    shares, others = columns(found, "of_copy"), columns(found, "faster_than")
    rows = []
    for name, piece in found.items():
        rows.append(
            (
                name,
                str(piece["shape"]),
                f"{piece['bytes'] / 1e6:.0f}",
                "yes" if piece["captured"] else "no",
                *(cell(piece["of_copy"].get(key)) for key in shares),
                *(cell(piece["faster_than"].get(key), "x") for key in others),
            )
        )
    yield "Shares of a copy's bandwidth; then how much longer others take than the first backend."
    header = ("", "shape", "MB", "graph", *shares, *(f"vs {key}" for key in others))
    yield table(header, rows)


def columns(found: Done, figure: str) -> list[str]:
    """The entries of a figure in any piece, in order."""
    return list(dict.fromkeys(key for piece in found.values() for key in piece.get(figure, {})))


def cell(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def optimisers(found: Done) -> Iterator[str]:
    rows = [
        (
            name,
            entry,
            f"{seconds * 1e3:.3f}",
            cell(piece.get("of_copy", {}).get(entry)),
            cell(piece["over_fused"][entry], "x"),
        )
        for name, piece in found.items()
        for entry, seconds in piece["seconds"].items()
    ]
    yield table(("", "", "ms", "share of a copy's bandwidth", "torch fused"), rows)


def scoring(found: Done) -> Iterator[str]:
    rows = [
        (
            name,
            entry,
            f"{piece['tokens'] / seconds:,.0f}",
            cell(piece["over_backbone"].get(entry), "x"),
        )
        for name, piece in found.items()
        if "skipped" not in piece
        for entry, seconds in piece["seconds"].items()
    ]
    yield table(("", "", "tokens/s", "time / backbone"), rows)
    for name, piece in found.items():
        if "skipped" in piece:
            yield f"{name}: skipped, {piece['skipped']}."


def training(found: Done) -> Iterator[str]:
    """Times and memory beside dense training."""
    dense = found.get("dense", {})
    rows = []
    for name, piece in found.items():
        peak, of = piece.get("peak_bytes"), dense.get("peak_bytes")
        rows.append(
            (
                name,
                f"{piece['trained'] / 1e6:.1f}",
                f"{piece['seconds'] * 1e3:.1f}",
                cell(piece["seconds"] / dense["seconds"] if dense else None, "x"),
                "" if peak is None else f"{peak / 2**30:.1f}",
                cell(peak / of if peak and of else None, "x"),
            )
        )
    header = ("", "trained, M", "ms", "time / dense", "peak GiB", "memory / dense")
    yield table(header, rows)
