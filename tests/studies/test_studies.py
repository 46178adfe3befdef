"""What all studies share: claims, settings that are refused, commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_studies import MEASURED, SOURCES
from typer.testing import CliRunner

from ssah.cli import app
from ssah.studies.claims import claim
from ssah.studies.scan.settings import ScanSettings
from ssah.studies.stability.settings import StabilitySettings
from ssah.studies.training.settings import BudgetSettings, FreezeSettings


def test_claims_say_what_their_interval_says():
    torch.manual_seed(0)
    noise = 0.01 * torch.randn(50, 3, dtype=torch.float64)
    zero = torch.zeros_like(noise)
    lower = claim("A below B", noise - 1, zero, "lower", "nats")
    assert lower["holds"]
    assert lower["verdict"] == "reproduces"
    assert lower["interval"][0] <= lower["value"] <= lower["interval"][1] < 0
    assert "-1.0" in lower["sentence"]
    assert "50 requests x 3 seeds" in lower["sentence"]
    other = claim("A below B", noise + 1, zero, "lower", "points")
    assert (other["holds"], other["verdict"]) == (False, "contradicted")
    assert "+100." in other["sentence"]
    open_ = claim("A below B", torch.randn(50), torch.zeros(50), "lower", "nats")
    assert (open_["holds"], open_["verdict"]) == (False, "undecided")
    assert "includes 0" in open_["sentence"]
    assert claim("A as low", noise + 0.02, zero, "not higher", "points", slack=0.05)["holds"]
    same = claim("A as low", torch.ones(100), torch.ones(100), "not higher", "points", slack=0.05)
    assert same["holds"]
    assert same["interval"] == pytest.approx([-0.037, 0.037], abs=1e-3)
    assert not claim("A as low", noise + 0.08, zero, "not higher", "points", slack=0.05)["holds"]


@pytest.mark.parametrize(
    ("settings", "wrong", "message"),
    [
        (ScanSettings, {"shares": (0.0,)}, "shares is 0.0"),
        (ScanSettings, {"shares": (0.4,), "ru_shares": (0.3,)}, "at most 1"),
        (ScanSettings, {"tokens": "auto"}, "labels, all"),
        (StabilitySettings, {"sizes": ()}, "sizes"),
        (StabilitySettings, {"enough": 1.0}, "enough is 1.0"),
        (FreezeSettings, {"arms": ("scu", "none")}, "first must be none"),
        (FreezeSettings, {"arms": ("none", "most")}, "one or more of none, scu"),
        (FreezeSettings, {"seeds": (1, 1)}, "different numbers"),
        (FreezeSettings, {"lora_lr": 0.0}, "lora_lr is 0.0"),
        (BudgetSettings, {"ru": 0.0}, "ru is 0.0"),
        (BudgetSettings, {"epochs": 0.0}, "epochs is 0.0"),
        (FreezeSettings, {"lr": float("inf")}, "lr is inf; it must be finite and greater than 0"),
        (FreezeSettings, {"target_loss": float("nan")}, "target_loss is nan; it must be finite"),
        (BudgetSettings, {"slack": float("nan")}, "slack is nan; it must be finite"),
    ],
)
def test_wrong_settings_are_refused(settings, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


def call(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


def common(out: Path) -> list[object]:
    return [
        "--safety", SOURCES["safety"], "--utility", SOURCES["utility"], "--dtype", "float32",
        "--out", out,
    ]  # fmt: skip


MEASURING = [
    "--requests", "builtin:safety_eval[0:2]", "--requests", "builtin:safety_eval[2:4]",
    "--utility-eval", MEASURED["utility_eval"],
]  # fmt: skip


def test_options_take_several_values(model_folder, tmp_path):
    found = call(
        "scan", "--shares", 0.05, 0.1, "--ru-shares", 0.2, model_folder, *MEASURING,
        *common(tmp_path / "scan"),
    )  # fmt: skip
    assert found["settings"]["shares"] == [0.05, 0.1]
    assert found["settings"]["ru_shares"] == [0.2]
    assert found["data"]["requests"]["rows"] == 4
    assert "asr" not in found["result"]["intact"]
    found = call(
        "stability", model_folder, *common(tmp_path / "stability"), "--sizes", 2, 4,
        "--resamples", 2,
    )  # fmt: skip
    assert found["settings"]["sizes"] == [2, 4]


@pytest.mark.exhaustive  # `test_options_take_several_values` calls two of them
def test_studies_as_commands(model_folder, tmp_path):
    quick = ["--max-steps", 2, "--sample", 4, "--max-new-tokens", 40, "--asr", 2, "--no-bf16"]
    found = call(
        "study", "freeze", model_folder, *common(tmp_path / "freeze"), *MEASURING, *quick,
        "--finetune", "builtin:utility[20:30]", "--arms", "none", "scu", "--seeds", 3, 4,
        "--scu", 0.05,
    )  # fmt: skip
    assert found["settings"]["seeds"] == [3, 4]
    assert list(found["result"]["arms"]) == ["before", "none", "scu"]
    found = call(
        "study", "budget", model_folder, *common(tmp_path / "budget"), *MEASURING, *quick
    )  # fmt: skip
    assert found["result"]["arms"]["full"]["seeds"]["0"]["training"]["steps"] == 2
    assert not (tmp_path / "budget" / "models" / "full-0").exists()
