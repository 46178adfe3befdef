"""The section, the picture and the terminal's tables of a comparison of methods."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, Page, browse
from comparisons import HOSTILE, LINES, NEEDS_HARMFUL, comparison
from matplotlib.figure import Figure
from rich.console import Console

from ssah.report.html import write_report
from ssah.report.html.comparison import Comparison
from ssah.report.html.comparison import comparison as section
from ssah.report.pictures import plot_pareto
from ssah.report.pictures.labels import label_points
from ssah.report.terminal import compare_tables

KEEP = [name for name, (subject, _, _) in LINES.items() if subject == "tuned"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return comparison()


def written(folder: Path, result: dict[str, Any]) -> Path:
    record = {"kind": "compare", "settings": {"model": "m"}, "result": result, "finished": True}
    (folder / "experiment.json").write_text(json.dumps(record, allow_nan=False))
    write_report(folder, folder / "report.html")
    return folder / "report.html"


def row_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["method"] == name)


def line_of(shown: Comparison, name: str) -> Any:
    return next(line for each in shown.rankings for line in each.methods if line.name == name)


def test_every_method_stands_with_its_control(found: dict[str, Any], tmp_path: Path) -> None:
    shown = section(found)
    assert [line.name for line in shown.rankings[0].methods] == KEEP
    assert [len(each.methods) for each in shown.rankings] == [7, 2, 1]
    for ranking in shown.rankings:
        for line in (*ranking.baselines, *ranking.methods):
            assert len(line.cells) == len(ranking.columns)
            assert not line.control or len(line.control_cells) == len(ranking.columns)
    row, line = row_of(found, "sppft"), line_of(shown, "sppft")
    texts = dict(zip(shown.rankings[0].columns, line.cells, strict=True))
    beside = dict(zip(shown.rankings[0].columns, line.control_cells, strict=True))
    own, control = row["mean"], row["control"]["mean"]
    low, high = (100 * end for end in own["asr_interval"])
    assert texts["ASR, wei2024"].text == f"{100 * own['asr']:.1f}%"
    assert texts["ASR, wei2024"].below == f"[{low:.1f}, {high:.1f}]"
    # Of the second judge: the mean over seeds of the rates that each seed has.
    strict = [seed["judges"]["short:12"]["asr"]["rate"] for seed in row["seeds"].values()]
    assert texts["ASR, short:12"].text == f"{100 * sum(strict) / 2:.1f}%"
    assert texts["ASR, short:12"].text != texts["ASR, wei2024"].text
    assert texts["task loss"].text == f"{own['task_loss']:.3f}"
    assert float(texts["task loss"].order) == own["task_loss"]
    assert beside["utility loss"].text == f"{control['utility_loss']:.3f}"
    difference = row["differences"]["control"]["asr"]["value"]
    assert texts["ASR less its control's"].text == f"{100 * difference:+.1f} points"
    assert texts["cost"].text == "4 min 12 s"
    assert texts["cost"].below == "2.0 GiB"
    smallest = row["verdict"]["smallest_difference"]
    assert line.remark == f"this run could show {100 * smallest:.1f} points"
    text = " ".join(Page(written(tmp_path, found).read_text()).text.split())
    for expected in (
        found["recommendation"]["sentence"], found["recommendation"]["rule"], row["paper"],
        *row["departures"], row["control"]["against"], "alpha 0.5", "layers 3, 4, 5",
        "find 12.5 s, train 4 min 0 s, 60 updates",
        "Strengths that were tried", "Every seed", line.remark,
    ):  # fmt: skip
        assert " ".join(expected.split()) in text, expected


def test_what_did_not_run_stands_last_and_nothing_becomes_markup(
    found: dict[str, Any], tmp_path: Path
) -> None:
    html = written(tmp_path, found).read_text()
    page = Page(html)
    text = " ".join(page.text.split())
    assert text.index("Not run") > text.index("refusal-direction while it runs")
    assert text.index(NEEDS_HARMFUL) > text.index(f"hostile after fine-tuning {HOSTILE}")
    # The only script is that of the page, and the browser is told its hash.
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [each["content"] for each in page.all("meta") if "http-equiv" in each]
    assert str(policy).endswith(f"; script-src 'sha256-{digest}'")
    assert len(page.all("script")) == 1


def test_without_controls_and_with_one_seed(tmp_path: Path) -> None:
    found = comparison(seeds=(3,), controls=False)
    shown = section(found)
    line = line_of(shown, "sppft")
    assert (line.state, line.remark) == ("undecided", "there is no control")
    assert not line.control
    texts = dict(zip(shown.rankings[0].columns, line.cells, strict=True))
    # One seed has an interval under each judge.
    rate = row_of(found, "sppft")["seeds"]["3"]["judges"]["short:12"]["asr"]
    low, high = (100 * end for end in rate["interval"])
    assert texts["ASR, short:12"].below == f"[{low:.1f}, {high:.1f}]"
    assert not shown.justified
    assert "No method is justified" in Page(written(tmp_path, found).read_text()).text
    plot_pareto(found, tmp_path / "pareto.png", "t")
    assert "  its control" not in terminal(found)


def test_one_that_stopped_short_says_so(found: dict[str, Any]) -> None:
    row = row_of(found, "sppft") | {"reached": False}
    (line,) = section({**found, "rows": [row]}).rankings[0].methods
    assert line.remark.startswith("it stopped short of the common training loss; ")


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_a_click_sorts(found: dict[str, Any], tmp_path: Path, width: int) -> None:
    script = """
        const table = page.querySelector("table.sortable");
        const heads = [...table.tHead.rows[0].cells];
        const names = () => [...table.querySelectorAll("tbody.method strong")]
          .map((each) => each.textContent);
        const click = (name) => {
          heads.find((each) => each.textContent === name).firstChild.click();
          return names();
        };
        return {before: names(), up: click("task loss"), down: click("task loss"),
          name: click("method"), rows: [...table.tBodies].map((each) => each.rows.length)};
    """
    seen = browse(written(tmp_path, found), width, tmp_path / "shot.png", script=script)
    assert seen["content"] <= width, "the page scrolls sideways"
    by_loss = sorted(KEEP, key=lambda name: row_of(found, name)["mean"]["task_loss"])
    assert seen["done"] == {
        "before": KEEP, "up": by_loss, "down": by_loss[::-1], "name": sorted(KEEP),
        "rows": [2] * 8,
    }  # fmt: skip


def terminal(result: dict[str, Any]) -> str:
    console = Console(width=200, file=io.StringIO())
    for part in compare_tables({"result": result}, Path("runs/compare")):
        console.print(part)
    return console.file.getvalue()


def test_the_terminal_shows_it_in_100_columns(found: dict[str, Any]) -> None:
    lines = terminal(found).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("Use "))]
    assert max(len(line.rstrip()) for line in table) <= 100
    (line,) = [each for each in table if each.startswith(" sppft")]
    row = row_of(found, "sppft")
    low, high = (100 * end for end in row["mean"]["asr_interval"])
    value = 100 * row["differences"]["control"]["asr"]["value"]
    assert f" {100 * row['mean']['asr']:.0f} ({low:.0f}-{high:.0f}) " in line
    assert f" {value:+.0f} (" in line
    assert line.split()[-1] == "yes"
    (undecided,) = [each for each in table if each.startswith(" ssah-freezing")]
    assert undecided.rstrip().endswith("undecided (46)")  # Wilson's of none of 8, times 1.43
    assert HOSTILE in "\n".join(lines)


def test_names_cover_neither_each_other_nor_points() -> None:
    figure = Figure(figsize=(5, 4), dpi=100)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    points = [(0.5, 0.5, f"method number {i}") for i in range(9)] + [(0.98, 0.02, "in the corner")]
    label_points(figure, axes, points, [(0.55, 0.55)])
    figure.draw_without_rendering()
    names = [each for each in axes.texts if each.get_text()]
    boxes = [each.get_window_extent() for each in names]
    assert [each.get_text() for each in names] == [name for _, _, name in points]
    inside = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1
        for x, y in ((0.5, 0.5), (0.55, 0.55), (0.98, 0.02)):
            assert not box.contains(*axes.transData.transform((x, y)))
