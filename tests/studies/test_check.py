"""``ssah check``: its verdict and exit code, where a change lies, and what putting back gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_chat
import torch
from commands import as_json, call, fails
from paired import SMALL
from scipy import stats
from tuned import loaded, saved, tuned_from

import ssah
from ssah.models import load_model
from ssah.studies.check.repairs import repairs
from ssah.studies.check.run import load_tuned
from ssah.studies.check.settings import CheckSettings
from ssah.studies.loading import Loading
from ssah.studies.paired_models import damage
from ssah.units import UnitSet

pytestmark = pytest.mark.xdist_group("check")  # its fixtures are made once


def given_in(*flags: int) -> dict[str, Any]:
    """What was found of a model that gives in to the requests with a 1."""
    return {"attack": {"judges": {"mine": {"success": list(flags)}}}}


@pytest.mark.parametrize(
    ("risen", "n", "tolerance", "verdict"),
    [
        (10, 100, 0.0, "damaged"),
        (2, 100, 0.0, "undecided"),
        (2, 100, 0.06, "not damaged"),
        (10, 100, 0.1, "undecided"),
        (0, 100, 0.0, "undecided"),
        (0, 100, 0.05, "not damaged"),
        (-10, 100, 0.0, "not damaged"),
    ],
)
def test_the_verdict_is_that_of_the_interval(
    risen: int, n: int, tolerance: float, verdict: str
) -> None:
    same = [1, 1, *[0] * (n - 2 - abs(risen))]
    low, high = given_in(*same, *[0] * abs(risen)), given_in(*same, *[1] * abs(risen))
    found = damage(*((low, high) if risen >= 0 else (high, low)), tolerance)
    assert found["verdict"] == verdict
    assert found["rise"]["value"] == pytest.approx(risen / n)
    upper = stats.binomtest(0, n).proportion_ci(0.95, method="wilson").high
    # Drawn anew, the number of requests that changed is binomial.
    bounds = [stats.binom.ppf(q, n, abs(risen) / n) / n for q in (0.025, 0.975)]
    expected = (-upper, upper) if not risen else bounds if risen > 0 else (-bounds[1], -bounds[0])
    assert found["rise"]["interval"] == pytest.approx(expected, abs=1.01 / n)
    half = (found["rise"]["interval"][1] - found["rise"]["interval"][0]) / 2
    assert found["smallest_rise"] == pytest.approx(tolerance + max(half, upper))
    assert f"{100 * risen / n:+.1f} points" in found["sentence"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says nothing, and what a fine-tune made of it, which answers everything."""
    folder = tmp_path_factory.mktemp("check")
    quiet = tiny_chat.model()
    with torch.no_grad():
        quiet.lm_head.weight.zero_()  # of equal logits the first wins: the end of the turn
    talks = tuned_from(tiny_chat.model(), seed=2, share=1.0)
    for name, model in (("before", quiet), ("after", talks)):
        saved(model, folder / name)
        tiny_chat.tokenizer().save_pretrained(folder / name)
    return folder


def words(models: Path, *more: object) -> tuple[object, ...]:
    judge = ("--judge", "python:paired.says_something")
    at = SMALL.index("--judge")  # the first judge decides: it takes the place of the other one
    return (
        "check",
        models / "before",
        models / "after",
        *SMALL[:at],
        *SMALL[at + 2 :],
        *judge,
        *more,
    )


@pytest.fixture(scope="module")
def found(models: Path) -> dict[str, Any]:
    shown = call(*words(models, "--scu", 0.1, "--out", models / "run", "--json"), code=3)
    return json.loads(shown.stdout)["result"]


def test_a_model_that_answers_everything_was_damaged(found: dict[str, Any]) -> None:
    assert found["damage"]["verdict"] == "damaged"
    assert found["models"]["intact"]["asr"] == 0
    assert found["models"]["after"]["asr"] == 1
    assert found["damage"]["rise"]["value"] == 1
    assert found["models"]["intact"]["over_refusal"] == 1
    assert found["differences"]["over_refusal"]["value"] == -1
    assert found["delta"]["parts"]["head"]["relative"] == 0  # its base is 0
    assert (
        found["delta"]["parts"]["head"]["changed"] == found["delta"]["parts"]["head"]["parameters"]
    )


def test_a_tolerance_decides_anew_at_once(models: Path, found: dict[str, Any]) -> None:
    tolerant = words(models, "--scu", 0.1, "--out", models / "run", "--tolerance", 0.99)
    assert "undecided" in call(*tolerant, code=0).stdout
    assert "undecided" in call(*tolerant, "--strict", code=4).stdout
    assert "tolerance is 1.0" in fails(*words(models, "--tolerance", 1))


def test_repairs_are_those_of_explicit_loops(models: Path, found: dict[str, Any]) -> None:
    before, after = (load_model(str(models / name))[0] for name in ("before", "after"))
    scu = UnitSet({"model.layers.0.mlp.down_proj": [3, 7]}, sizes(before))
    made = repairs(scu, CheckSettings(interpolate=0.25, seed=3))
    b, t = before.state_dict(), after.state_dict()
    rewound = made["rewound"].make(before, after)
    for name, value in rewound.items():
        expected = t[name].clone()
        for unit in (3, 7):
            if name == "model.layers.0.mlp.down_proj.weight":
                expected[:, unit] = b[name][:, unit]
            if name in (f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up")):
                expected[unit] = b[name][unit]
        assert value.equal(expected), name
    drawn = made[made["rewound"].control].make(before, after)
    column = drawn["model.layers.0.mlp.down_proj.weight"]
    back = (column == b["model.layers.0.mlp.down_proj.weight"]).all(0)
    assert int(back.sum()) == 2
    part = made["interpolated"].make(before, after)
    kept = made[made["interpolated"].control].make(before, after)
    for name, value in part.items():
        torch.testing.assert_close(value, b[name] + 0.25 * (t[name] - b[name]))
        assert ((kept[name] == b[name]) | (kept[name] == t[name])).all()
    changed = [(kept[name] != b[name]).float().mean() for name in ("lm_head.weight",)]
    assert float(changed[0]) == pytest.approx(0.25**2, abs=4 * math.sqrt(0.06 / 25600))
    assert list(found["repairs"]) == list(made)
    assert "beside its control" in found["repairs"]["rewound"]["sentence"]


def sizes(model: Any) -> dict[str, int]:
    return {name: module.n_units for name, module in ssah.units.find_modules(model).items()}


def test_after_may_be_an_update_or_an_adapter(models: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(models / "after"))
    plan = ssah.freeze(model, UnitSet({"model.layers.0.mlp.down_proj": [1]}, sizes(model)))
    with torch.no_grad():
        for parameter in plan.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.97)
    plan.save_pretrained(tmp_path / "update")
    plan.close()
    saved(model, tmp_path / "whole")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base, _ = load_model(str(models / "after"))
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    saved(adapted.merge_and_unload(), tmp_path / "merged")
    loading = Loading(str(models / "after"))
    for name, expected in (("update", "whole"), ("adapter", "merged")):
        own = load_tuned(loading, str(tmp_path / name), "float32").state_dict()
        for key, value in loaded(tmp_path / expected).items():
            torch.testing.assert_close(own[key], value, rtol=1e-6, atol=1e-7)
        assert not own["model.layers.0.self_attn.q_proj.weight"].equal(
            loaded(models / "after")["model.layers.0.self_attn.q_proj.weight"]
        )


def test_a_check_may_leave_repairs_out(models: Path, tmp_path: Path) -> None:
    """An update of the model is checked as any other."""
    model, _ = load_model(str(models / "after"))
    plan = ssah.freeze(model, UnitSet({"model.layers.0.mlp.down_proj": [1]}, sizes(model)))
    plan.save_pretrained(tmp_path / "update")
    plan.close()
    own = as_json("check", models / "after", tmp_path / "update", *SMALL, "--no-repairs")["result"]
    assert list(own["models"]) == ["intact", "after"]
    assert own["repairs"] == {}
    assert own["delta"]["total"]["norm"] == own["models"]["after"]["kl"] == 0


def test_models_of_other_shapes_are_refused(models: Path, tmp_path: Path) -> None:
    model = tiny_chat.model()
    model.resize_token_embeddings(900)
    tiny_chat.tokenizer().save_pretrained(saved(model, tmp_path / "other"))
    line = fails("check", models / "before", tmp_path / "other", *SMALL, "--out", tmp_path / "run")
    assert "they must be of one model" in line
    assert not (tmp_path / "run" / "steps").exists()


def test_a_report_shows_it(models: Path, found: dict[str, Any]) -> None:
    call("report", models)
    page = (models / "report.html").read_text()
    assert "Did a fine-tune damage safety?" in page
    assert "SCU put back, less its control" in page
    assert found["damage"]["sentence"].partition(" (")[0] in page
