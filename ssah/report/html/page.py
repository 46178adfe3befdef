"""``ssah report``: one HTML file with the tables and pictures of every run in a folder.

Nothing is fetched: no font, no style sheet from elsewhere, and pictures are part of the file. The
only script sorts the tables of a comparison; the page names its hash, so that no other one runs.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from ssah.report.html.comparison import Comparison, comparison
from ssah.report.html.kinds import KINDS, Kind, claims_table, kind_of
from ssah.report.html.plain import MISSING, Table, duration, number, tables
from ssah.storage import RECORD, check_replaceable, write_whole
from ssah.version import __version__

_DEMO, _TRAINING = "demo.json", "run.json"  # of `ssah demo`; of `ssah finetune` and `ssah align`
_PNG = b"\x89PNG\r\n\x1a\n"  # how every PNG begins
_SKIPPED = ("checkpoints", "steps")  # folders of a run in which no run is

_MARK = b'<meta name="generator" content="ssah'  # of every page, see report.html.j2


@dataclass(frozen=True)
class Picture:
    """A picture of a run."""

    url: str | None  # with all of its bytes in it; None: the file is missing
    alt: str  # what it shows, in words
    name: str  # of the file
    width: int = 0  # at which its letters have the size of a page's, CSS pixels


@dataclass(frozen=True)
class Section:
    """A run as the page shows it. All of it is text: what a record holds never becomes markup."""

    anchor: str  # unique in the page
    title: str  # of its kind
    about: str  # one sentence on what such a run shows
    folder: str  # relative to the folder of the report
    model: str  # what the run is about, or ""
    state: str  # "finished" or "unfinished"
    claims: Sequence[Sequence[str]]  # claim, "yes", "no" or "undecided", measured, sentence
    comparison: Comparison | None  # of methods, before the tables
    tables: Sequence[Table]  # of the result
    pictures: Sequence[Picture]
    command: str  # that was given, or ""
    facts: Sequence[tuple[str, str]]  # name and value: versions, time, seeds
    data: Sequence[Table]
    settings: Sequence[Table]


def write_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    title: str = "Safety-critical neurons",
) -> list[dict[str, Any]]:
    """Write one self-contained HTML file about every run found in a folder.

    Runs are the folders with an ``experiment.json``, a ``demo.json`` of ``ssah demo`` or a
    ``run.json`` of ``ssah finetune`` and ``ssah align``, at any depth.

    Args:
        folder: where to look.
        out: the file; an earlier report there is replaced.
        title: of the page.

    Returns:
        Per run: ``kind``, ``folder`` (relative) and ``finished``, in the order of the page.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
        FileExistsError: ``out`` is a file of another kind.
        ValueError: a run's file is not JSON.
        ImportError: jinja2 is not installed.
    """
    root, target = Path(folder), Path(out)
    if not root.is_dir():
        raise FileNotFoundError(f"directory {str(root)!r} does not exist")
    check_replaceable(target, _MARK, "report of ssah")
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("jinja2 is not installed, which writes it: pip install 'ssah[report]'")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    order = list(KINDS)
    found = sorted(_runs(root), key=lambda run: (order.index(run[0]), str(run[1])))
    if not found:
        raise FileNotFoundError(
            f"directory {str(root)!r} has no run: no {RECORD}, {_DEMO} or {_TRAINING} of ssah"
        )
    sections = [
        _section(kind, path, record, root, f"run-{i}")
        for i, (kind, path, record) in enumerate(found, start=1)
    ]
    # StrictUndefined: a field that the template names and nothing has is an error, not a gap.
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sortable = any(section.comparison is not None for section in sections)
    script = files(__package__).joinpath("sorting.js").read_text(encoding="utf-8")
    page = environment.get_template("report.html.j2").render(
        title=title,
        sections=sections,
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        script=script if sortable else "",
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page.encode())
    return [
        {"kind": kind, "folder": section.folder, "finished": section.state == "finished"}
        for (kind, _, _), section in zip(found, sections, strict=True)
    ]


def _runs(root: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Kind, folder and record of every run; kinds that are not known have the name ``other``."""
    for path, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        for name in (RECORD, _DEMO, _TRAINING):
            if name in names:
                record = _read(Path(path) / name)
                kind = kind_of(name.removesuffix(".json"), record)
                if kind is not None:
                    yield kind, Path(path), record


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return record if isinstance(record, dict) else {}


def _section(
    name: str, folder: Path, record: Mapping[str, Any], root: Path, anchor: str
) -> Section:
    kind = KINDS[name]
    title = kind.title if name != "other" else str(record.get("kind", kind.title))
    # `ssah demo` writes its result alone, and at the end.
    result = record if name == "demo" and "settings" not in record else record.get("result")
    finished = bool(record.get("finished", result is not None))
    shown = result if isinstance(result, Mapping) else {}
    return Section(
        anchor=anchor,
        title=title,
        about=kind.about,
        folder=str(folder.relative_to(root)),
        model=_model(record),
        state="finished" if finished else "unfinished",
        claims=claims_table(shown.get("claims")),
        comparison=comparison(shown) if name == "compare" and shown else None,
        tables=kind.tables(shown) if shown else [],
        pictures=[_picture(path, folder, kind) for path in _pictures(record)],
        command=str(record.get("command") or ""),
        facts=list(_facts(record, folder)),
        data=_data(record.get("data")),
        settings=tables(record.get("settings") or record.get("identity") or {}),
    )


def _model(record: Mapping[str, Any]) -> str:
    for fields in (record.get("settings"), record):
        if isinstance(fields, Mapping) and isinstance(fields.get("model"), str):
            return str(fields["model"])
    return ""


def _pictures(record: Mapping[str, Any]) -> list[str]:
    """File names: an experiment has a list, the demonstration a mapping."""
    given = record.get("pictures") or []
    return [str(path) for path in (given.values() if isinstance(given, Mapping) else given)]


def _picture(path: str, folder: Path, kind: Kind) -> Picture:
    """Only a PNG in the folder of the run is shown, whatever its record says."""
    name = Path(path).name
    alt = kind.pictures.get(Path(path).stem, f"{kind.title}: picture {name}")
    inside = (folder / path).resolve()
    if not inside.is_relative_to(folder.resolve()) or not inside.is_file():
        inside = (folder / name).resolve()  # the demonstration says where it was run from
    if not inside.is_relative_to(folder.resolve()) or not inside.is_file():
        return Picture(None, alt, name)
    content = inside.read_bytes()
    if not content.startswith(_PNG):  # an SVG could hold a script, whatever its name says
        return Picture(None, alt, name)
    # PNG, section 11.2.2: after the signature and the head of the first chunk. In pixels.
    width = int.from_bytes(content[16:20], "big")
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(url, alt, name, width * 96 // 150)  # of 150 dots an inch, 96 of CSS


def _facts(record: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """When, how long, with what, and every seed."""
    result = record.get("result")
    inner = result if isinstance(result, Mapping) else {}
    if record.get("started"):
        yield "started", str(record["started"])
    seconds = record.get("seconds", inner.get("seconds"))
    yield "time taken", duration(seconds)
    if not record.get("finished", True):
        done = len(list((folder / "steps").glob("*.json")))
        yield "steps done", number(done)
    versions = record.get("versions")
    if not isinstance(versions, Mapping):  # the demonstration names them one by one
        names = {"ssah": ("ssah", "version"), "torch": ("torch",)}
        versions = {
            name: record[key] for name, keys in names.items() for key in keys if key in record
        }
    yield "versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or MISSING
    if "threads" in record:
        yield "threads", number(record["threads"])
    settings = record.get("settings")
    if isinstance(settings, Mapping) and "level" in settings:
        yield "level of intervals", number(settings["level"])
    seeds = list(_seeds(record.get("settings") or record.get("identity") or {}))
    yield "seeds", ", ".join(seeds) or MISSING


def _seeds(data: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(data, Mapping):
        return
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _seeds(value, f"{prefix}{key} ")
        elif "seed" in str(key):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{key} {shown}"


def _data(data: Any) -> list[Table]:
    """What was read: role, source, rows and fingerprint."""
    if not isinstance(data, Mapping) or not data:
        return []
    if not all(isinstance(row, Mapping) for row in data.values()):
        return tables(data)
    rows = []
    for role, row in data.items():
        source, digest = (str(row.get(key, MISSING)) for key in ("source", "fingerprint"))
        rows.append((str(role), source, number(row.get("rows")), digest))
    columns = ("role", "source", "rows or units", "fingerprint (SHA-256)")
    return [Table("", columns, tuple(rows), names=4)]
