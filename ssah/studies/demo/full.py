"""``ssah demo --full``: the demonstration, then a fine-tune with and without freezing, a report.

Everything on the built-in data. Each part is a run in a folder of its own, and goes on where it
was interrupted when the same command is given again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ssah.attribution import attribute
from ssah.data import make_loader
from ssah.groups import UnitGroups, classify
from ssah.models import move
from ssah.report.html import write_report
from ssah.studies.demo.aligned_model import working_dtype
from ssah.studies.demo.screen import heading
from ssah.studies.demo.short import run_demo
from ssah.studies.loading import Loading
from ssah.studies.probe import run_probe
from ssah.studies.training.freeze import NONE, RANDOM, SCU_CU, run_freeze
from ssah.studies.training.settings import FreezeSettings
from ssah.studies.transfer import run_transfer

_SAFETY, _UTILITY = "builtin:safety", "builtin:utility"
_REQUESTS, _ANSWERS = "builtin:safety_eval", "builtin:utility_eval"
_UNALIGNED = "groups-unaligned"
_PARTS = (
    "probe",
    "freeze",
    _UNALIGNED,
    *(f"groups-{arm}" for arm in (NONE, SCU_CU)),
    *(f"transfer-{change}" for change in ("alignment", NONE, SCU_CU)),
)
_SEED = 0
UPDATES = 30  # of the benign fine-tune with nothing frozen


def run_full_demo(
    loading: Loading,
    out: Path,
    *,
    seconds: float,
    shares: Mapping[str, float],
    fresh: bool = False,
) -> dict[str, Any]:
    """Run everything, print it as it goes, and leave it in ``out`` with ``report.html``.

    Args:
        loading, out, seconds, shares, fresh: as :func:`ssah.studies.demo.run_demo` takes them;
            ``fresh`` begins the other parts anew as well.

    Returns:
        What ``demo.json`` holds, and ``probe``, ``freeze`` and ``transfer`` (by alignment and by
        both fine-tunes): the results of these runs; ``report``: the HTML file.
    """
    console, name = Console(highlight=False), loading.name
    if fresh:  # an aligned model that is made anew leaves nothing that still fits it
        for part in _PARTS:
            shutil.rmtree(out / part, ignore_errors=True)
    result = _earlier(out, name, shares) if not fresh else None
    if result is None:
        result = run_demo(loading, out, seconds=seconds, shares=shares, fresh=fresh)
    else:
        console.print(f"The demonstration of an earlier call is used: {out / 'demo.json'}")
    aligned = replace(loading, name=str(out / "aligned")) if result["alignment"] else loading

    heading(console, "full", "Probe: which way do hidden states lean?")
    # Without an alignment there is one model, and nothing to compare it with.
    beside = name if result["alignment"] else None
    probed = run_probe(out / "probe", aligned, _REQUESTS, beside=beside)

    heading(console, "full", "A benign fine-tune, with and without freezing")
    # Its arms end with the same training loss, so that what differs is what was frozen.
    tuned = run_freeze(
        aligned,
        out / "freeze",
        FreezeSettings(
            seeds=(_SEED,),
            arms=(NONE, SCU_CU, RANDOM),
            lr=1e-4,
            max_steps=UPDATES,
            max_new_tokens=40,  # enough for the words by which a refusal is known
            **shares,  # type: ignore[arg-type]
        ),
        safety=_SAFETY,
        utility=_UTILITY,
        finetune=_UTILITY,
        requests=[_REQUESTS],
        utility_eval=_ANSWERS,
        save_model=True,
    )

    heading(console, "full", "Transfer: which units changed their group?")
    moved = _transfers(aligned, name if result["alignment"] else None, out)
    for change in moved:
        console.print(f"{change}: {out / f'transfer-{change}'}")

    report = out / "report.html"
    write_report(out, report, title=f"{name}: safety-critical neurons")
    console.print(f"\nEverything on one page: [bold]{report}[/bold]")
    return {
        **result,
        "probe": probed["result"],
        "freeze": tuned["result"],
        "transfer": {change: record["result"] for change, record in moved.items()},
        "report": str(report),
    }


def _earlier(out: Path, name: str, shares: Mapping[str, float]) -> dict[str, Any] | None:
    """The result of the demonstration in ``out``, if it is of this model and these shares."""
    path = out / "demo.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    same = result["model"] == name and result["groups"]["shares"] == dict(shares)
    return result if same else None


def _transfers(loading: Loading, unaligned: str | None, out: Path) -> dict[str, Any]:
    """What moved units between groups: the alignment, if there was one, and both fine-tunes.

    Args:
        loading: of the model that was scored in ``out``.
        unaligned: that model before its alignment; None where there was none.
        out: folder of the demonstration, with its groups and the models of its fine-tunes.

    Returns:
        ``"alignment"`` or the arm -> the record of :func:`ssah.studies.run_transfer`.
    """
    groups, moved = out / "groups", {}
    if unaligned is not None:
        before = _regrouped(loading, unaligned, groups, out / _UNALIGNED)
        moved["alignment"] = run_transfer(
            before, groups, out / "transfer-alignment", title="Attribute transfer by alignment"
        )
    for arm in (NONE, SCU_CU):
        tuned = str(out / "freeze" / "models" / f"{arm}-{_SEED}")
        after = _regrouped(loading, tuned, groups, out / f"groups-{arm}")
        title = f"Attribute transfer by a benign fine-tune, frozen: {arm.replace('-', ' and ')}"
        moved[arm] = run_transfer(groups, after, out / f"transfer-{arm}", title=title)
    return moved


def _regrouped(loading: Loading, model: str, like: Path, out: Path) -> Path:
    """``out``, with the units of another model grouped as those in ``like`` were."""
    if (out / "meta.json").is_file():  # written by an earlier call, whole or not at all
        return out
    own = UnitGroups.load(like)  # of the same shares and scope, or no unit could be compared
    loaded, tokenizer = loading("auto", model)
    move(loaded, working_dtype(loaded, loading.dtype))
    scores = [
        attribute(loaded, make_loader(source, tokenizer, batch_size=8), progress=True)
        for source in (_SAFETY, _UTILITY)
    ]
    groups = classify(*scores, **own.shares, scope=own.scope, normalize=own.normalize)  # type: ignore[arg-type]
    groups.save(out)
    return out
