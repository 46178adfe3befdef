"""A scan of twelve shares beside a scan of one, and a point of it beside whole rows as before.

Two ratios, each within one process, in seconds of the processor:

* ``shares``: ``ssah scan`` with twelve shares of SCU and UCU, beside one of one share. A scan
  scores units once, so that the ratio is smaller than that of the points, 40 to 7.
* ``point``: margins and losses of one model as they are measured, where a request is run once for
  both openings and what rows begin with alike once, beside a pass over whole rows for each.

    python benchmarks/bench_scan.py --out bench_out/scan.json
    python benchmarks/bench_scan.py --model smollm2 --only point
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.chat import BATCH, random_model, whole_rows
from ssah.data import load_requests, make_loader
from ssah.evaluation import refusal_margins, utility_loss
from ssah.models import load_model
from ssah.studies import Loading
from ssah.studies.scan import ScanSettings, run_scan

LIMIT = 3  # of twelve shares beside one
ONE = (0.008,)
TWELVE = tuple(round(0.0027 * k, 4) for k in range(1, 13))
_RU = (0.15,)


def scan(folder: str, shares: tuple[float, ...], out: Path) -> dict[str, Any]:
    """The record of a scan of the built-in sets."""
    settings = ScanSettings(shares=shares, ru_shares=_RU, batch_size=BATCH)
    return run_scan(
        Loading(folder, dtype="float32"),
        out,
        settings,
        safety="builtin:safety",
        utility="builtin:utility",
        requests=["builtin:safety_eval"],
        utility_eval="builtin:utility_eval",
    )


def of_shares(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What scans of one share and of twelve take."""
    seconds, points = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        for name, shares in (("one", ONE), ("twelve", TWELVE)):
            begun = time.process_time()
            record = scan(f"{folder}/model", shares, Path(folder) / name)
            seconds[name] = time.process_time() - begun
            points[name] = 1 + sum(map(len, record["result"]["curves"].values()))
    return {
        "seconds": seconds,
        "points": points,
        "ratio": seconds["twelve"] / seconds["one"],
        "limit": LIMIT,
    }


def as_measured(model: Any, tokenizer: Any, requests: list[str]) -> list[float]:
    """The same as the library measures it."""
    loader = make_loader("builtin:utility_eval", tokenizer, batch_size=BATCH)
    margins = refusal_margins(model, tokenizer, requests, batch_size=BATCH)
    return [*margins.tolist(), utility_loss(model, loader)]


def of_point(model: Any, tokenizer: Any, repeats: int) -> dict[str, Any]:
    """What margins and losses of one model take, both ways in turn."""
    requests = load_requests("builtin:safety_eval")
    calls: dict[str, Callable[[], list[float]]] = {
        "shared": lambda: as_measured(model, tokenizer, requests),
        "whole rows": lambda: whole_rows(model, tokenizer, requests),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            begun = time.process_time()
            found[name] = call()
            times[name].append(time.process_time() - begun)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    pairs = zip(found["shared"], found["whole rows"], strict=True)
    return {
        "seconds": seconds,
        "ratio": seconds["shared"] / seconds["whole rows"],
        "largest_difference": max(abs(a - b) for a, b in pairs),
    }


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"A scan of {record['model']}, in seconds of the processor")
    for column in ("what", "seconds", "beside", "seconds", "ratio", "limit"):
        table.add_column(column, justify="right")
    if "shares" in record:
        own = record["shares"]
        twelve, one = (f"{own['points'][name]} points" for name in ("twelve", "one"))
        seconds = [f"{own['seconds'][name]:.1f}" for name in ("twelve", "one")]
        ratio = f"{own['ratio']:.2f}"
        table.add_row(f"twelve shares, {twelve}", seconds[0], f"one, {one}", seconds[1], ratio, "3")
    if "point" in record:
        own = record["point"]
        seconds = [f"{own['seconds'][name]:.2f}" for name in ("shared", "whole rows")]
        ratio = f"{own['ratio']:.2f}"
        table.add_row("margins and loss", seconds[0], "whole rows", seconds[1], ratio, "")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("bench_out/scan.json"))
    parser.add_argument("--model", help="In place of a random one: as load_model takes it.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("shares", "point"))
    options = parser.parse_args()
    if options.model is None:
        model, tokenizer = random_model(options.width, options.layers)
        name = f"random, {options.layers} layers of width {options.width}"
    else:
        model, tokenizer = load_model(options.model, dtype="float32")
        name = options.model
    record: dict[str, Any] = {"model": name}
    if options.only != "shares":
        record["point"] = of_point(model, tokenizer, options.repeats)
    if options.only != "point":
        record["shares"] = of_shares(model, tokenizer)
    common.write(options.out, "scan", [record])
    show(record)


if __name__ == "__main__":
    main()
