"""Studies that train: to equal loss, from where they stopped, and what they freeze."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from tiny_studies import BUDGET, FREEZE, MEASURED, SOURCES

import ssah
from ssah.compat.trainer import TrainerCallback
from ssah.data import encode, load_rows, make_loader
from ssah.groups import UnitGroups, classify
from ssah.methods import TrainingSetup
from ssah.models import load_model
from ssah.studies.measured_values import losses
from ssah.studies.training import comparison as comparison_module
from ssah.studies.training import freeze as freeze_module
from ssah.studies.training import run_budget, run_freeze
from ssah.studies.training.settings import FREEZE_ARMS
from ssah.studies.training.to_loss import Recipe, train, training_loss

pytestmark = pytest.mark.xdist_group("training studies")  # its fixtures are made once


@pytest.fixture(scope="module")
def aligned(loading, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("budget") / "run"
    found = run_budget(
        loading, out, BUDGET, **SOURCES, **MEASURED, math="builtin:utility_eval[6:9]",
        save_model=True,
    )  # fmt: skip
    return out, found


@pytest.fixture(scope="module")
def frozen(loading, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("freeze") / "run"
    task = "builtin:utility[20:40]"
    return out, run_freeze(loading, out, FREEZE, **SOURCES, **MEASURED, finetune=task)


def whole(model) -> TrainingSetup:
    return TrainingSetup(model, None, lambda: model)


def test_a_setup_has_an_order_and_callbacks_of_its_own(model_folder):
    model, tokenizer = load_model(str(model_folder))
    rows = list(encode(load_rows("builtin:utility[0:8]"), tokenizer))
    recipe = Recipe(lr=1e-4, batch_size=2, bf16=False, seed=3)
    asked, seen = [], []

    class Steps(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    def order(task, size, steps, seed):
        asked.append((task, size, steps, seed))
        return [task[0], task[5]] * steps

    own = dataclasses.replace(whole(model), order=order, callbacks=(Steps(),))
    found = train(own, model, tokenizer, [rows], rows[:2], recipe, steps=3)
    assert asked == [(rows, 2, 3, 3)]
    assert seen == [0, 1, 2]
    assert found["tokens"] == 3 * (len(rows[0]["input_ids"]) + len(rows[5]["input_ids"]))


def test_training_stops_at_the_target(model_folder):
    model, tokenizer = load_model(str(model_folder))
    rows = list(encode(load_rows("builtin:utility[0:8]"), tokenizer))
    recipe = Recipe(lr=3e-3, batch_size=4, bf16=False, seed=0, check_every=2)
    start = training_loss(model, tokenizer, rows, bf16=False)
    seen: list[int] = []
    found = train(
        whole(model), model, tokenizer, [rows], rows, recipe, steps=40, target=start - 1,
        advance=seen.append,
    )  # fmt: skip
    assert found["reached"]
    assert found["steps"] == seen[-1] < 40
    steps, measured = zip((0, start), *found["losses"], strict=True)
    assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(steps))
    assert steps[1:3] == (2, 4)
    assert found["loss"] == measured[-1] <= start - 1 < min(measured[:-1])
    assert found["loss"] == pytest.approx(training_loss(model, tokenizer, rows, bf16=False))
    # One update here is many times what the loss may miss the target by.
    assert found["last_step"] < 1
    assert found["loss"] >= start - 1 - 0.005


def test_budget_trains_redundant_units_alone(aligned, loading):
    out, record = aligned
    result = record["result"]
    assert list(result["arms"]) == ["before", "full", "ru"]
    base, _ = load_model(loading.name)
    model, _ = load_model(str(out / "models" / "ru-0"))
    groups = UnitGroups.load(out / "groups", base)
    assert len(groups["ru"]) == result["units"]["ru"] == round(0.3 * 192)
    for name in groups["ru"]:
        changed = (
            base.get_parameter(f"{name}.weight") != model.get_parameter(f"{name}.weight")
        ).any(0)
        assert not changed[~groups["ru"].mask(name)].any()
        assert changed.any() == bool(len(groups["ru"][name]))
    trained = {name: arm["seeds"]["0"]["training"] for name, arm in result["arms"].items()}
    assert trained["full"]["steps"] == 3
    assert trained["ru"]["target"] == trained["full"]["loss"]
    assert trained["ru"]["reached"] == (trained["ru"]["loss"] <= trained["full"]["loss"])
    assert trained["ru"]["steps"] <= 5
    assert trained["full"]["loss"] < trained["before"]["loss"]
    assert {"utility_loss", "math_loss"} < set(result["arms"]["ru"]["mean"])
    texts = [each["claim"] for each in result["claims"]]
    assert len(texts) == len(set(texts)) == 8
    assert (out / "budget.png").is_file()


def test_freeze_trains_every_arm_to_the_same_loss(frozen, loading):
    out, record = frozen
    result = record["result"]
    assert list(result["arms"]) == ["before", *FREEZE.arms]
    assert not (out / "models").exists() or not any((out / "models").iterdir())
    for seed in ("0", "1"):
        arms = {name: arm["seeds"][seed]["training"] for name, arm in result["arms"].items()}
        target = arms["none"]["loss"]
        assert arms["none"]["target"] is None
        for name in FREEZE.arms[1:]:
            assert arms[name]["target"] == target
            assert arms[name]["reached"] == (arms[name]["loss"] <= target)
            assert arms[name]["reached"] or arms[name]["steps"] == 9
    assert result["frozen_units"]["random"] == result["frozen_units"]["scu-cu"] == 10 + 12
    mean = result["arms"]["none"]["mean"]
    (against,) = (
        each
        for each in result["differences"]
        if (each["arm"], each["against"], each["what"]) == ("scu-cu", "none", "asr")
    )
    assert against["value"] == pytest.approx(result["arms"]["scu-cu"]["mean"]["asr"] - mean["asr"])
    step = json.loads((out / "steps" / "measure-none-0.json").read_text())["result"]
    assert float(losses(step, "utility").mean()) == pytest.approx(step["losses"]["utility"]["loss"])


def test_a_study_goes_on_where_it_was(frozen, loading, tmp_path, monkeypatch):
    _, record = frozen
    out, calls, train = tmp_path / "run", [], comparison_module.train
    settings = dataclasses.replace(FREEZE, seeds=(0,), arms=("none", "random"))

    def killed(*args, **kwargs):
        calls.append(kwargs["target"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    def run():
        return run_freeze(
            loading, out, settings, **SOURCES, **MEASURED, finetune="builtin:utility[20:40]"
        )

    monkeypatch.setattr(comparison_module, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    arms = run()["result"]["arms"]
    assert len(calls) == 3  # one arm was trained before it was stopped, one after
    assert calls[0] is None
    for name in ("none", "random"):
        own = arms[name]["seeds"]["0"]
        expected = record["result"]["arms"][name]["seeds"]["0"]
        assert own["training"]["losses"] == expected["training"]["losses"]
        assert own["refusal_margin"] == expected["refusal_margin"]


def test_what_arms_freeze(loading):
    model, tokenizer = load_model(loading.name)
    scores = [ssah.attribute(model, make_loader(SOURCES[name], tokenizer)) for name in SOURCES]
    groups = classify(*scores, scu=0.05, ucu=0.05, ru=0.15, scope="model", normalize="zscore")
    units = {name: freeze_module._units(name, groups, FREEZE, seed=3) for name in FREEZE_ARMS}
    assert not len(units["none"])
    assert not len(units["lora"])
    assert units["scu"] == groups["scu"]
    assert units["scu-all-cu"] == groups["scu"] | groups["cu"]
    assert len(units["scu-cu"]) == len(groups["scu"]) + round(0.06 * 192)
    assert len(units["scu-cu"] & (groups["ucu"] | groups["ru"])) == 0
    counts = {name: len(index) for name, index in units["scu-cu"].items()}
    assert {name: len(index) for name, index in units["random"].items()} == counts
    assert units["random"] != freeze_module._units("random", groups, FREEZE, seed=4)
    counts = {name: len(index) for name, index in units["scu-all-cu"].items()}
    assert {name: len(index) for name, index in units["random-all"].items()} == counts
    assert units["random-all"] != units["scu-all-cu"]
