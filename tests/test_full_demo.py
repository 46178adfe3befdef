"""``ssah demo --full`` on a tiny model, from end to end, and once more from where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tiny_chat
from typer.testing import CliRunner

from ssah.cli import app


def test_full_demo_from_end_to_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ssah.full_demo.UPDATES", 2)
    model, out = str(tiny_chat.save(tmp_path / "tiny")), tmp_path / "demo"
    command = ["demo", "--model", model, "--out", str(out), "--seconds", "3", "--full", "--json"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    result = json.loads(first.stdout)
    assert set(result["freeze"]["arms"]) == {"before", "none", "scu-cu", "random"}
    assert len(result["probe"]["models"]) == 2
    assert set(result["transfer"]) == {"alignment", "none", "scu-cu"}
    for moved in result["transfer"].values():
        assert abs(sum(map(sum, moved["matrix"])) - 1) < 1e-9
    page = (out / "report.html").read_text()
    for command_part in ("probe", "transfer", "freeze", "demo"):
        assert command_part in page.lower()

    # What is done is not done again; what is missing is.
    shutil.rmtree(out / "transfer-none")
    kept = (out / "freeze" / "steps" / "train-none-0.json").stat().st_mtime_ns
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout)["freeze"] == result["freeze"]
    assert (out / "freeze" / "steps" / "train-none-0.json").stat().st_mtime_ns == kept
    assert (out / "transfer-none" / "transfer.png").is_file()
