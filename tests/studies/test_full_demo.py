"""``ssah demo --full`` on a tiny model, from end to end, and once more from where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ssah
from ssah.cli import app
from ssah.groups import UnitGroups


@pytest.mark.exhaustive  # `test_demo_from_end_to_end` runs what it begins with
def test_full_demo_from_end_to_end(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssah.studies.demo.full.UPDATES", 2)
    out = tmp_path / "demo"
    command = ["demo", "--model", str(tiny_chat_folder), "--out", str(out)]
    command += ["--seconds", "1", "--full", "--json"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    result = json.loads(first.stdout)

    groups = UnitGroups.load(out / "groups")
    assert result["freeze"]["frozen_units"] == {"none": 0, "scu-cu": 14, "random": 14}
    frozen = groups["scu"] | groups.top("cu", 0.06)
    assert len(frozen) == 14  # of 192: 1 % and 6 %, rounded
    before = weights(out / "aligned")
    for arm in ("none", "scu-cu"):
        after = weights(out / "freeze" / "models" / f"{arm}-0")
        for name, units in frozen.items():
            same = (after[f"{name}.weight"] == before[f"{name}.weight"]).all(0)
            kept = units.tolist() if arm == "scu-cu" else []
            assert same.nonzero().flatten().tolist() == kept, (arm, name)

    after = {"alignment": groups} | {
        arm: UnitGroups.load(out / f"groups-{arm}") for arm in ("none", "scu-cu")
    }
    assert set(result["transfer"]) == set(after)
    for change, own in after.items():
        start = UnitGroups.load(out / "groups-unaligned") if change == "alignment" else groups
        assert result["transfer"][change]["matrix"] == ssah.transfer(start, own).matrix.tolist()
    probed = result["probe"]["models"]
    assert [each["model"] for each in probed] == [str(out / "aligned"), str(tiny_chat_folder)]
    assert len(probed[0]["by_layer"]["difference"]) == 3  # the embeddings and two layers

    page = (out / "report.html").read_text()
    assert set(result["freeze"]["arms"]) == {"before", "none", "scu-cu", "random"}
    for arm in result["freeze"]["arms"].values():
        assert f"{arm['mean']['utility_loss']:.3f}" in page
    for run in ("probe", "freeze", *(f"transfer-{change}" for change in after)):
        assert run in page

    # What is done is not done again; what is missing is.
    shutil.rmtree(out / "transfer-none")
    kept_at = (out / "freeze" / "steps" / "train-none-0.json").stat().st_mtime_ns
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout)["freeze"] == result["freeze"]
    assert (out / "freeze" / "steps" / "train-none-0.json").stat().st_mtime_ns == kept_at
    assert (out / "transfer-none" / "transfer.png").is_file()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()
