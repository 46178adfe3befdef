"""A scan from end to end on a tiny model: its rules, its resuming, what it keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_studies import MEASURED, SCAN, SOURCES, tree

import ssah
from ssah.data import make_loader
from ssah.evaluation import Answer
from ssah.evaluation.attacks import answering
from ssah.groups import UnitGroups, classify
from ssah.models import load_model
from ssah.studies.loading import Loading
from ssah.studies.scan import ScanSettings, run_scan
from ssah.studies.scan.curves import Curves, Point

pytestmark = pytest.mark.xdist_group("scan")  # its fixture is made once


@pytest.fixture(scope="module")
def scanned(loading, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("scan") / "run"
    return out, run_scan(loading, out, SCAN, **SOURCES, **MEASURED)


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


@pytest.mark.exhaustive  # `test_a_study_goes_on_where_it_was` is of the same run folder
def test_a_scan_goes_on_where_it_was(scanned, loading, tmp_path, monkeypatch):
    _, record = scanned
    out = tmp_path / "run"
    answers, calls, answered = answering.answers_of_arms, [], []

    def killed(model, tokenizer, encoded, jobs, *args, **kwargs):
        calls.append(jobs)
        if len(calls) == 5:  # the intact model, both batches of two RU, the first of two SCU
            raise KeyboardInterrupt
        answered.extend(jobs)
        return answers(model, tokenizer, encoded, jobs, *args, **kwargs)

    monkeypatch.setattr(answering, "answers_of_arms", killed)
    # Two arms of a batch of three: as much as this memory holds.
    monkeypatch.setattr(answering, "fitting_rows", lambda *_: 6)
    with pytest.raises(KeyboardInterrupt):
        run_scan(loading, out, SCAN, **SOURCES, **MEASURED)
    before = tree(out / "steps")
    steps = {Path(path).stem for path in before}
    assert {"ru-0.1", "scu-0.05-attack.0000", "scu-0.1-attack.0000"} < steps
    assert not {"scu-0.05-attack.0001", "scu-0.05-attack"} & steps
    again = run_scan(loading, out, SCAN, **SOURCES, **MEASURED)
    assert again["result"] == record["result"]
    assert before.items() <= tree(out / "steps").items()
    assert len(answered) == SCAN.asr * len(list((out / "steps").glob("*-attack.json")))
    with pytest.raises(ValueError, match=r"tolerance 0\.15, not 0\.5"):
        run_scan(loading, out, dataclasses.replace(SCAN, tolerance=0.5), **SOURCES, **MEASURED)


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


def test_answers_too_short_for_a_judge_are_refused_before_a_model_is_loaded(tmp_path):
    short = dataclasses.replace(SCAN, max_new_tokens=39)
    with pytest.raises(ValueError, match="max_new_tokens is 39, but judge 'wei2024'"):
        run_scan(Loading("no such model"), tmp_path / "run", short, **SOURCES, **MEASURED)


def test_no_answer_is_kept(loading, tmp_path, monkeypatch):
    mark = "an answer that must not be kept anywhere, whatever it says, be it harmless or not, here"

    def answered(model, tokenizer, encoded, jobs, *args, **options):
        return [Answer(mark, 20, True) for _ in jobs]

    monkeypatch.setattr(answering, "answers_of_arms", answered)
    settings = dataclasses.replace(SCAN, shares=(0.05,), ru_shares=(0.1,), compare=False)
    record = run_scan(loading, tmp_path, settings, **SOURCES, **MEASURED)
    assert record["result"]["intact"]["requests"] == 4
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or mark.encode()[:20] not in path.read_bytes()
