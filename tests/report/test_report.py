"""The report: what is in the page, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import BROWSER, Page, browse
from matplotlib.image import imread
from typer.testing import CliRunner

from ssah.cli import app
from ssah.groups import GROUPS, Transfer
from ssah.report.html.kinds import KINDS, claims_table, kind_of
from ssah.report.html.page import write_report
from ssah.report.html.plain import MISSING, duration, number, tables, with_interval
from ssah.report.html.records import records_table
from ssah.report.pictures.style import picture
from ssah.report.pictures.transfer import plot_transfer
from ssah.studies.run_folder import Run

pytestmark = pytest.mark.xdist_group("report")  # its fixtures are made once

HOSTILE = "<script>alert('x')</script> & \"quoted\""
DATA = {"requests": {"source": HOSTILE, "rows": 32, "fingerprint": "0123456789abcdef" * 4}}
CLAIMS = [
    {"claim": "It holds", "holds": True, "value": 0.31, "interval": [0.2, 0.4],
     "unit": "points", "verdict": "reproduces", "sentence": "So it is."},
    {"claim": "It does not", "holds": False, "value": -0.5, "interval": [-0.6, -0.4],
     "unit": "nats", "verdict": "contradicted", "sentence": HOSTILE},
    {"claim": "Nobody knows", "holds": None},
]  # fmt: skip
MEASURED = {
    "utility_loss": 2.031, "refusal_margin": 1.25, "refuses": 0.97,
    "refuses_interval": [0.84, 0.99], "asr": 0.031, "asr_interval": [0.01, 0.16],
}  # fmt: skip


def moved() -> Transfer:
    """Units of a model in which most are complex, and a few of the others moved."""
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[0] = torch.tensor([0.0045, 0.0002, 0.0003, 0.008])
    matrix[1] = torch.tensor([0.0001, 0.11, 0.002, 0.0209])
    matrix[2] = torch.tensor([0, 0.001, 0.0738, 0.0742])
    matrix[3] = torch.tensor([0.0007, 0.0132, 0.004, 0.6871])
    return Transfer(GROUPS, matrix / matrix.sum())


def transfer_result() -> dict[str, Any]:
    return {
        "units": 72_000, "groups": list(GROUPS), "matrix": moved().matrix.tolist(),
        "kept": {"scu": 0.346, "ucu": 0.827, "ru": None, "cu": 0.97}, "scope": "model",
    }  # fmt: skip


def probe_result() -> dict[str, Any]:
    layers = [0.1, -0.02, 0.3]
    intervals = [[x - 0.05, x + 0.05] for x in layers]
    by_layer = {
        key: values
        for name in ("refusal", "compliance", "difference")
        for key, values in ((name, layers), (f"{name}_intervals", intervals))
    }
    by_tokens = {"difference": layers[:2], "difference_intervals": intervals[:2]}
    row = {"model": "aligned", "safe_from": 2, "by_layer": by_layer, "by_tokens": by_tokens}
    return {"models": [row, {**row, "model": "plain", "safe_from": None}], "claims": CLAIMS}


def scan_result() -> dict[str, Any]:
    points = [{"share": x, "units": 100, **MEASURED, "loss_rise": 0.1} for x in (0.004, 0.008)]
    return {
        "intact": MEASURED, "curves": {"scu": points, "random": points},
        "chosen": {"scu": points[0], "ru": None}, "rule": "the largest share", "units": 72_000,
        "compare": {"criterion": "the fall", "ways": [{"scope": "model", "normalize": "zscore",
                                                       "tokens": "all", "taken": 1.2}]},
        "claims": CLAIMS,
    }  # fmt: skip


RESULTS: dict[str, dict[str, Any]] = {
    "transfer": transfer_result(),
    "probe": probe_result(),
    "scan": scan_result(),
    "freeze": {"arms": {"scu_cu": {"0": MEASURED, "1": MEASURED}}, "claims": CLAIMS},
    "a new one": {HOSTILE: [1.5, 2.5], "rows": [{"name": HOSTILE, "asr": 0.5}], "deep": [[1, 2]]},
}


def add(folder: Path, kind: str, result: Mapping[str, Any] | None, *, wide: bool = False) -> Path:
    """A run in ``folder``; without a result it is not finished."""
    run = Run(folder, kind, {"model": HOSTILE, "seeds": [0, 1, 2], "seed": 7}, DATA)
    run.record["command"] = "ssah " + kind + (" --option value" * 30 if wide else "")
    with run.begin():
        run.step("first", lambda: 1)
        if result is not None:
            with picture(folder / f"{kind}.png", kind, (12, 5)) as figure:
                figure.subplots().plot([1, 2])
            run.finish(result, [folder / f"{kind}.png"])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of many kinds, at several depths, and files that are none."""
    root = tmp_path_factory.mktemp("runs")
    for kind, result in RESULTS.items():
        add(root / "deep" / kind.replace(" ", "-"), kind, result, wide=True)
    plot_transfer(moved(), root / "deep" / "transfer" / "transfer.png", "Attribute transfer")
    add(root / "unfinished", "budget", None)
    (root / "demo").mkdir()
    with picture(root / "demo" / "scores.png", "scores", (12, 6)) as figure:
        figure.subplots().plot([1, 2])
    demo = {
        "model": "smollm2", "ssah": "0.1.0", "torch": "2.13", "seconds": 215.0,
        "alignment": {"steps": 60, "seconds": 90.0, "before": MEASURED, "after": MEASURED},
        "groups": {"layers": [{"layer": 0, "units": 9, "scu": 1, "ucu": 1, "ru": 2, "cu": 5}]},
        "ablation": [{"group": None, "random": False, "units": 0, "fraction": 0.0, **MEASURED},
                     {"group": "scu", "random": True, "units": 9, "fraction": 0.1, **MEASURED}],
        "pictures": {"scores": "elsewhere/scores.png", "ablation": "../../../etc/passwd"},
    }  # fmt: skip
    (root / "demo" / "demo.json").write_text(json.dumps(demo))
    (root / "tuned").mkdir()
    (root / "tuned" / "run.json").write_text(
        json.dumps({"version": "0.1.0", "identity": {"lr": 1e-5, "seed": 3}})
    )
    for name, content in (("run.json", {"a": 1}), ("demo.json", [1]), ("experiment.json", {})):
        (root / name).write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of these runs."""
    out = tmp_path_factory.mktemp("report") / "pages" / "report.html"
    write_report(runs, out)
    return out


def test_every_run_is_there_in_order(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(runs), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(run["kind"], run["finished"]) for run in found["runs"]] == [
        ("demo", True), ("scan", True), ("freeze", True), ("budget", False), ("transfer", True),
        ("probe", True), ("finetune", False), ("other", True),
    ]  # fmt: skip
    assert found["bytes"] == out.stat().st_size
    again = CliRunner().invoke(app, ["report", str(runs)])
    assert again.exit_code == 0
    assert "UNFINISHED" in again.stdout
    (runs / "report.html").unlink()


def test_the_page_says_it_all_and_escapes_it(page: Path) -> None:
    html = page.read_text()
    found = Page(html)
    assert not found.all("script")
    assert HOSTILE in " ".join(found.text.split())
    anchors = {tag["id"] for tag in found.all("section")}
    links = [tag["href"] for tag in found.all("a")]
    assert {f"#{anchor}" for anchor in anchors} == set(links)
    assert len(links) == len(found.all("section")) == 8
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attributes:
                assert str(attributes[name]).startswith(("data:", "#")), (tag, attributes)
    images = found.all("img")
    assert len(images) == 6
    assert all(image["alt"] and len(str(image["alt"])) > 15 for image in images)
    for image in images:  # as large as on paper, where an inch has 96 CSS pixels
        content = base64.b64decode(str(image["src"]).partition(",")[2])
        assert int(str(image["width"])) == imread(io.BytesIO(content)).shape[1] * 96 // 150
    assert "url(" not in html
    assert "@import" not in html
    text = " ".join(found.text.split())
    for expected in (
        "unfinished", "fingerprint", "0123456789abcdef", "ssah transfer --option value",
        "seeds 0, 1, 2, seed 7", "3 min 35 s", "97.0% [84.0, 99.0]", "72,000",
        "+31.0 [+20.0, +40.0] points", "-0.500 [-0.600, -0.400] nats",
        "The picture passwd is not in the folder of the run.", "as many random as SCU",
        "The difference is above 0 from layer 2 on.", "No share of redundant (RU) units",
    ):  # fmt: skip
        assert expected in text, expected
    states = [tag["class"] for tag in found.all("span") if "mark" in str(tag.get("class"))]
    assert {"mark yes", "mark no", "mark undecided", "mark unfinished"} <= set(states)


def test_numbers_stand_on_the_right(page: Path) -> None:
    html = page.read_text()
    start = html.index("From group (row) to group (column)")
    table = html[start : html.index("</table>", start)]
    assert '<td>complex (CU)</td><td class="n">' in table.replace("\n", "")
    assert table.count('<th scope="col" class="n">') == 6


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "result",
    [
        {}, {"claims": None}, {"claims": [1, {}]}, {"models": 3, "curves": [], "matrix": [[1]]},
        {"groups": ["scu"], "matrix": [[1.0]]}, {"models": [{}]}, {"curves": {"scu": None}},
        {"chosen": {"scu": {}}, "intact": None}, {"alignment": {}, "ablation": [{}]},
        {"x": {"y": {"z": [{"a": {"b": 1}}]}}, "empty": [], "none": None},
    ],
)  # fmt: skip
def test_a_missing_field_does_not_matter(kind: str, result: dict[str, Any], tmp_path: Path) -> None:
    for table in KINDS[kind].tables(result):
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    (tmp_path / "experiment.json").write_text(
        json.dumps({"kind": kind, "settings": {}, "result": result, "finished": True})
    )
    assert len(write_report(tmp_path, tmp_path / "report.html")) == 1


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no run"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(ValueError, match=r"experiment\.json is not JSON"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<!doctype html><title>mine</title>")
    with pytest.raises(FileExistsError, match=r"report\.html' is there already and is no report"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(IsADirectoryError, match="a folder; it must be a file"):
        write_report(tmp_path, tmp_path)


# ------------------------------------------------------------------------------- generic tables


def test_values_as_text() -> None:
    assert [number(x) for x in (None, True, 12345, 0.123456, 12345.0, "a")] == [
        "–", "yes", "12,345", "0.1235", "12,345", "a",
    ]  # fmt: skip
    assert with_interval(0.5, [0.25, 0.75], ".0%") == "50% [25, 75]"
    assert with_interval(0.5, None) == "0.5"
    found = [duration(seconds) for seconds in (None, 0.25, 200, 7300)]
    assert found == ["–", "0.2 s", "3 min 20 s", "2 h 1 min"]


def test_plain_data_as_tables() -> None:
    found = {
        table.title: table
        for table in tables(
            {
                "asr": 0.25,
                "asr_interval": [0.1, 0.5],
                "loss": {"mean": 2.0, "interval": [1.5, 2.5]},
                "rows": [{"name": "a", "n": 1}, {"name": "b", "refuses": 0.5}],
                "arms": {"x": {"loss": 1.0}, "y": {"loss": 2.0}},
                "matrix": [[1, 2], [3, 4]],
            }
        )
    }
    assert found[""].rows == (("asr", "25.0% [10.0, 50.0]"), ("loss", "2 [1.5, 2.5]"))
    assert found["rows"].columns == ("name", "n", "refuses")
    assert found["rows"].rows == (("a", "1", "–"), ("b", "–", "50.0%"))
    assert found["rows"].names == 1
    assert found["arms"].rows == (("x", "1"), ("y", "2"))
    assert found["matrix"].rows == (("0", "1", "2"), ("1", "3", "4"))


def test_a_count_is_no_share_and_an_empty_list_is_a_dash() -> None:
    (table,) = tables({"asr": 40, "refuses": 0.5, "tasks": []})
    assert table.rows == (("asr", "40"), ("refuses", "50.0%"), ("tasks", MISSING))


def test_columns_that_no_record_has_are_left_out() -> None:
    records = [{"what": "a", "asr": {"rate": 0.5, "interval": [0.2, 0.8]}}]
    table = records_table("t", records, [("", "what")], [("ASR", "asr", ".0%"), ("no", "no", "")])
    assert table.columns == ("", "ASR")
    assert table.rows == (("a", "50% [20, 80]"),)


def test_claims_and_kinds() -> None:
    assert [state for _, state, _, _ in claims_table(CLAIMS)] == ["yes", "no", "undecided"]
    undecided = {"claim": "c", "holds": False, "verdict": "undecided"}
    assert claims_table([undecided])[0][1] == "undecided"
    assert kind_of("experiment", {"kind": "scan", "settings": {}}) == "scan"
    assert kind_of("experiment", {"kind": "of my own", "settings": {}}) == "other"
    assert kind_of("experiment", {"kind": "scan"}) is None
    assert kind_of("demo", {}) is None
    assert kind_of("run", {"result": {}}) is None


# -------------------------------------------------------------------------------- in a browser


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_in_a_browser(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    found = browse(page, width, shot, dark=dark)
    assert found["width"] == width
    assert found["content"] <= width, "the page scrolls sideways"
    assert found["images"] == found["loaded"] == 6
    assert found["requests"] == []
    assert found["dark"] is dark
    pixels = imread(shot)
    assert pixels.shape[:2] == (1200, max(width, 500))
    assert bool(pixels[2, 2, :3].mean() < 0.2) is dark  # the paper


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
def test_the_browser_sees_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    image = "<img src='http://nowhere.invalid/a.png'>"
    bad.write_text(f"<body style='margin:0'>{image}<p style='width:3000px'>wide")
    found = browse(bad, 390, tmp_path / "shot.png", dark=False)
    assert found["content"] == 3000
    assert (found["images"], found["loaded"]) == (1, 0)
    assert found["requests"] == ["http://nowhere.invalid/a.png"]
    bad.write_text("<script>throw new Error('of the page')</script>")
    with pytest.raises(AssertionError, match="of the page"):
        browse(bad, 390, tmp_path / "shot.png", dark=False)
