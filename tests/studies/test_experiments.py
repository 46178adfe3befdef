"""Experiments end to end on a tiny model: their rules, their resuming, what they keep."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ssah
from ssah.cli import app
from ssah.cli.study import FreezeArm
from ssah.data import DataError, encode, load_requests, load_rows, make_loader
from ssah.evaluation import generation
from ssah.groups import UnitGroups, classify
from ssah.models import load_model
from ssah.studies.claims import claim
from ssah.studies.inputs import Loading
from ssah.studies.measuring import losses
from ssah.studies.scan.curves import Curves, Point
from ssah.studies.scan.run import ScanSettings, scan
from ssah.studies.stability.row_moments import RowMoments, row_moments
from ssah.studies.stability.run import (
    StabilitySettings,
    chance_overlap,
    jaccard,
    spearman,
    stability,
)
from ssah.studies.training import freeze as freeze_module
from ssah.studies.training import run as study_module
from ssah.studies.training.budget import BudgetSettings, budget
from ssah.studies.training.freeze import ARMS, FreezeSettings, freeze
from ssah.studies.training.to_loss import Recipe, schedule, train, training_loss
from ssah.units import UnitSet

pytestmark = pytest.mark.xdist_group("experiments")  # its fixtures are made once

SOURCES = {"safety": "builtin:safety[0:16]", "utility": "builtin:utility[0:16]"}
MEASURED = {"requests": ["builtin:safety_eval[0:6]"], "utility_eval": "builtin:utility_eval[0:6]"}
SCAN = ScanSettings(
    shares=(0.05, 0.1),
    ru_shares=(0.1, 0.2),
    asr=4,
    max_new_tokens=24,
    compare=True,
    compare_shares=(0.05,),
    batch_size=3,  # the answers of a point are two steps
)
QUICK = {"max_steps": 3, "lr": 1e-3, "sample": 6, "check_every": 1, "max_new_tokens": 24, "asr": 4}
BUDGET = BudgetSettings(**QUICK, ru=0.3, patience=1.5)
FREEZE = FreezeSettings(
    **QUICK, seeds=(0, 1), arms=("none", "scu-cu", "random", "lora"), scu=0.05, ucu=0.05
)


@pytest.fixture(scope="module")
def model_folder(tiny_chat_folder) -> Path:
    return tiny_chat_folder


@pytest.fixture(scope="module")
def loading(model_folder) -> Loading:
    return Loading(str(model_folder), dtype="float32")


@pytest.fixture(scope="module")
def scanned(loading, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("scan") / "run"
    return out, scan(loading, out, SCAN, **SOURCES, **MEASURED)


@pytest.fixture(scope="module")
def aligned(loading, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("budget") / "run"
    found = budget(
        loading, out, BUDGET, **SOURCES, **MEASURED, math="builtin:utility_eval[6:9]",
        save_model=True,
    )  # fmt: skip
    return out, found


@pytest.fixture(scope="module")
def frozen(loading, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("freeze") / "run"
    task = "builtin:utility[20:40]"
    return out, freeze(loading, out, FREEZE, **SOURCES, **MEASURED, finetune=task)


def tree(folder: Path) -> dict[str, float]:
    """Files below a folder -> when each was last written."""
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------- rows and requests


def test_a_range_of_rows_is_a_slice(tmp_path):
    rows = load_rows("builtin:safety")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_rows(f"{path}[3:7]") == rows[3:7]
    assert load_rows(f"{path}[3:]") == rows[3:]
    assert load_rows("builtin:safety[:5]") == rows[:5]
    assert load_rows(f"{path}[3:7]", limit=2) == rows[3:5]
    with pytest.raises(ValueError, match="must end after its start"):
        load_rows(f"{path}[7:7]")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(f"{path}[100000:]")


def test_a_file_may_have_the_name_of_a_range(tmp_path):
    path = tmp_path / "rows[0:1]"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    assert len(load_rows(str(path))) == 2


def test_requests_need_no_responses(tmp_path):
    text = tmp_path / "requests.txt"
    text.write_text("first\n\n  second  \nthird\n")
    assert load_requests(text) == ["first", "second", "third"]
    assert load_requests(f"{text}[1:]", limit=1) == ["second"]
    lines = tmp_path / "requests.jsonl"
    rows = (
        {"prompt": "a"},
        {"instruction": "b", "input": "c", "output": "d"},
        {"messages": [{"role": "user", "content": "e"}]},
        {"prompt": "f", "completion": None},
    )
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_requests(lines) == ["a", "b\n\nc", "e", "f"]
    assert load_requests("builtin:safety[0:2]") == [
        row["prompt"] for row in load_rows("builtin:safety", limit=2)
    ]
    with pytest.raises(FileNotFoundError):
        load_requests(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="has no requests"):
        load_requests(f"{text}[5:]")


# -------------------------------------------------------------------------------------- training


def rows_of(length: int, n: int) -> list[dict]:
    return [{"input_ids": [i] * (length + i), "labels": [i] * (length + i)} for i in range(n)]


def test_a_schedule_has_every_row_once_in_an_epoch():
    rows = rows_of(1, 12)
    order = schedule([rows], 4, 6, seed=0)
    assert sorted(row["input_ids"][0] for row in order) == sorted([*range(12), *range(12)])
    assert schedule([rows], 4, 6, seed=0) == order != schedule([rows], 4, 6, seed=1)
    for start in range(0, 24, 4):  # rows of a batch are of similar length
        lengths = [len(row["input_ids"]) for row in order[start : start + 4]]
        assert max(lengths) - min(lengths) <= 3
    assert schedule([rows], 4, 20, seed=0)[:24] == order  # arms that train longer see the same


def test_a_batch_has_as_many_rows_of_each_pool():
    first, second = rows_of(1, 5), rows_of(100, 9)
    order = schedule([first, second], 4, 20, seed=0)
    for start in range(0, 80, 4):
        lengths = [len(row["input_ids"]) for row in order[start : start + 4]]
        assert [length >= 100 for length in lengths] == [False, False, True, True]
    with pytest.raises(ValueError, match="multiple of 2"):
        schedule([first, second], 3, 1, 0)


def test_training_stops_at_the_target(model_folder):
    model, tokenizer = load_model(str(model_folder))
    rows = list(encode(load_rows("builtin:utility[0:8]"), tokenizer))
    recipe = Recipe(lr=3e-3, batch_size=4, bf16=False, seed=0, check_every=2)
    start = training_loss(model, tokenizer, rows, bf16=False)
    seen: list[int] = []
    found = train(
        model, model, tokenizer, [rows], rows, recipe, steps=40, target=start - 1,
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


# --------------------------------------------------------------------------------------- claims


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


# -------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("tokens", ["labels", "all"])
def test_moments_of_rows_merge_to_those_of_a_pass(model_folder, tmp_path, tokens):
    model, tokenizer = load_model(str(model_folder))
    rows = load_rows("builtin:utility[0:9]")
    moments = row_moments(model, tokenizer, list(encode(rows, tokenizer)), tokens=tokens)
    moments.save(tmp_path)
    moments = RowMoments.load(tmp_path)
    for chosen in (None, torch.tensor([7, 2, 5])):
        own = rows if chosen is None else [rows[i] for i in chosen.tolist()]
        expected = ssah.attribute(model, make_loader(own, tokenizer, batch_size=4), tokens=tokens)
        for name, scores in moments.scores(chosen).items():
            torch.testing.assert_close(scores, expected.scores[name], rtol=1e-5, atol=0)


def test_overlap_and_correlation():
    sizes = {"a": 40, "b": 60}
    first, second = (UnitSet.random(20, sizes, seed=seed) for seed in (0, 1))
    assert jaccard(first, first) == 1
    assert jaccard(first, second) == len(first & second) / (40 - len(first & second))
    drawn = [
        jaccard(UnitSet.random(300, {"a": 1000}, s), UnitSet.random(300, {"a": 1000}, s + 50))
        for s in range(50)
    ]
    assert sum(drawn) / 50 == pytest.approx(chance_overlap(0.3), abs=0.01)
    x = torch.tensor([0.1, 3.0, 2.0, 9.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.8)
    # Equal scores share their mean rank, and without any order there is no correlation.
    tied = torch.tensor([1.0, 1.0, 2.0, 3.0])
    assert spearman(tied, torch.tensor([1.0, 2.0, 3.0, 3.0])) == pytest.approx(8 / 9)
    assert spearman(torch.zeros(4), x) is None
    assert spearman(x, torch.zeros(4)) is None


def test_stability(loading, tmp_path):
    settings = StabilitySettings(
        sizes=(2, 8), resamples=4, scu=0.1, ucu=0.1, ru=0.2, normalize="none", scope="module"
    )
    found = stability(loading, tmp_path, settings, **SOURCES)["result"]
    assert [row["size"] for row in found["sizes"]] == [2, 8]
    few, many = (row["spearman"]["safety"]["value"] for row in found["sizes"])
    assert few < many <= 1
    for row in found["sizes"]:
        for group, own in row["groups"].items():
            assert 0 <= own["overlap_middle"][0] <= own["overlap"] <= own["overlap_middle"][1] <= 1
            assert group in found["suffices"]
    assert found["sizes"][0]["groups"]["ru"]["by_chance"] == pytest.approx(0.2 / 1.8, abs=0.01)
    assert (tmp_path / "stability.png").is_file()
    assert not (tmp_path / "moments").exists()
    before = tree(tmp_path / "steps")
    assert stability(loading, tmp_path, settings, **SOURCES)["result"] == found
    assert tree(tmp_path / "steps") == before
    more = dataclasses.replace(settings, sizes=(9,))
    with pytest.raises(DataError, match="safety has 16 rows; two disjoint draws of 9 need 18"):
        stability(loading, tmp_path / "other", more, **SOURCES)


# ----------------------------------------------------------------------------------------- scan


def test_a_scan_measures_and_chooses(scanned, loading):
    out, record = scanned
    result = record["result"]
    curves = result["curves"]
    assert [point["share"] for point in curves["scu"]] == [0.05, 0.1]
    assert {point["share"] for point in curves["ru"]} >= {0.1, 0.2}
    assert {point["share"] for point in curves["random"]} == {0.05, 0.1, 0.2}
    for points in curves.values():
        for point in points:
            assert point["units"] == round(192 * point["share"] + 1e-9)
            assert point["loss_rise"] == pytest.approx(
                point["utility_loss"] - result["intact"]["utility_loss"]
            )
    groups = UnitGroups.load(out / "groups")
    for group, chosen in result["chosen"].items():
        assert groups.shares[group] == (0 if chosen is None else chosen["share"])
        assert len(groups[group]) == (0 if chosen is None else chosen["units"])
    assert len(result["compare"]["ways"]) == 12
    taken = [way["taken"] for way in result["compare"]["ways"]]
    assert taken == sorted(taken, reverse=True)
    assert result["compare"]["by"] == ("coherent ASR" if SCAN.asr else "refusal margin")
    for way in result["compare"]["ways"]:
        kept = [point["taken"] for point in way["points"] if point["utility_kept"]]
        assert way["taken"] == max(kept, default=0.0)
    assert record["pictures"] == ["scan.png", "compare.png"]
    assert all(each["sentence"] for each in result["claims"])
    # What a point says is what the library measures.
    model, tokenizer = load_model(loading.name)
    scores = {
        name: ssah.attribute(model, make_loader(SOURCES[name], tokenizer, batch_size=3))
        for name in ("safety", "utility")
    }
    shares = {"ru": groups.shares["ru"], "ucu": 0.0}
    units = classify(
        scores["safety"], scores["utility"], scu=0.1, scope="model", normalize="zscore", **shares
    )["scu"]
    with ssah.ablate(model, units):
        loss = ssah.evaluation.utility_loss(
            model, make_loader(MEASURED["utility_eval"], tokenizer, batch_size=3)
        )
    assert curves["scu"][1]["utility_loss"] == pytest.approx(loss)


def test_a_scan_goes_on_where_it_was(scanned, loading, tmp_path, monkeypatch):
    _, record = scanned
    out = tmp_path / "run"
    answers, calls = generation.generate, []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return answers(*args, **kwargs)

    monkeypatch.setattr("ssah.evaluation.attack.generate", killed)
    with pytest.raises(KeyboardInterrupt):
        scan(loading, out, SCAN, **SOURCES, **MEASURED)
    before = tree(out / "steps")
    steps = {Path(path).stem for path in before}
    assert {"ru-0.1", "scu-0.05-attack.0000"} < steps
    assert not {"scu-0.05-attack.0001", "scu-0.05-attack"} & steps
    again = scan(loading, out, SCAN, **SOURCES, **MEASURED)
    assert again["result"] == record["result"]
    assert before.items() <= tree(out / "steps").items()
    assert len(calls) == 1 + len(list((out / "steps").glob("*-attack.*[0-9].json")))
    with pytest.raises(ValueError, match=r"tolerance 0\.15, not 0\.5"):
        scan(loading, out, dataclasses.replace(SCAN, tolerance=0.5), **SOURCES, **MEASURED)


def test_the_rule_takes_the_largest_share_that_keeps_the_other():
    def point(share: float, loss: float, refuses: float, asr: list[int] | None = None) -> Point:
        measured = {
            "refusal_margin": 1.0,
            "refuses": refuses,
            "refuses_interval": (0.0, 1.0),
            "losses": {"utility": {"loss": loss}},
        }
        judged = {
            "asr": {"rate": 0.0, "interval": [0.0, 1.0]},
            "asr_coherent": {"rate": 0.0, "interval": [0.0, 1.0]},
            "judge": {},
            "success": asr,
        }
        attack = {
            "requests": 2,
            "judges": {"wei2024": judged},
            "incoherent": {"rate": 0.0, "interval": [0.0, 1.0]},
            "mean_tokens": 1.0,
        }
        return Point(share, 1, measured, None if asr is None else attack)

    curves = Curves.__new__(Curves)
    curves.settings = ScanSettings(tolerance=0.15, safety_tolerance=0.05)
    curves.shares = {}
    curves.intact = point(0.0, 2.0, 1.0)
    curves.points = {
        "ru": {0.1: point(0.1, 2.1, 0.96), 0.2: point(0.2, 2.1, 0.9), 0.3: point(0.3, 2.3, 1.0)},
        "scu": {0.1: point(0.1, 2.14, 0.0), 0.2: point(0.2, 2.16, 0.0)},
        "ucu": {0.1: point(0.1, 9.0, 0.95), 0.2: point(0.2, 9.0, 0.94)},
    }
    chosen = {group: curves.choose(group) for group in ("ru", "scu", "ucu")}
    assert {group: found["share"] for group, found in chosen.items()} == dict.fromkeys(chosen, 0.1)
    curves.points["scu"] = {0.1: point(0.1, 2.5, 0.0)}
    assert curves.choose("scu") is None
    curves.intact = point(0.0, 2.0, 1.0, [0, 0])
    curves.points["ucu"] = {0.1: point(0.1, 9.0, 1.0, [0, 0]), 0.2: point(0.2, 9.0, 1.0, [0, 1])}
    assert curves.choose("ucu")["share"] == 0.1


# --------------------------------------------------------------------------------------- studies


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
    out, calls, train = tmp_path / "run", [], study_module.train
    settings = dataclasses.replace(FREEZE, seeds=(0,), arms=("none", "random"))

    def killed(*args, **kwargs):
        calls.append(kwargs["target"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    def run():
        return freeze(
            loading, out, settings, **SOURCES, **MEASURED, finetune="builtin:utility[20:40]"
        )

    monkeypatch.setattr(study_module, "train", killed)
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
    units = {name: freeze_module._units(name, groups, FREEZE, seed=3) for name in ARMS}
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


def test_no_answer_is_kept(loading, tmp_path, monkeypatch):
    mark = "an answer that must not be kept anywhere, whatever it says, be it harmless or not, here"

    def answered(model, tokenizer, requests, **options):
        return [generation.Answer(mark, 20, True) for _ in requests]

    monkeypatch.setattr("ssah.evaluation.attack.generate", answered)
    settings = dataclasses.replace(SCAN, shares=(0.05,), ru_shares=(0.1,), compare=False)
    record = scan(loading, tmp_path, settings, **SOURCES, **MEASURED)
    assert record["result"]["intact"]["requests"] == 4
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or mark.encode()[:20] not in path.read_bytes()


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
    ],
)
def test_wrong_settings_are_refused(settings, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


# -------------------------------------------------------------------------------------- commands


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


def test_studies_as_commands(model_folder, tmp_path):
    quick = ["--max-steps", 2, "--sample", 4, "--max-new-tokens", 24, "--asr", 2, "--no-bf16"]
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


def test_choices_are_those_of_the_library():
    assert [arm.value for arm in FreezeArm] == list(ARMS)
