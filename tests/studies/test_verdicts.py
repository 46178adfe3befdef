"""What a comparison says in words: verdicts, the smallest difference, the recommendation."""

from __future__ import annotations

from math import comb
from statistics import NormalDist
from typing import Any

import pytest
import torch
from comparisons import comparison

from ssah.studies.claims import measured_difference
from ssah.studies.compare import recommend, verdict


def row(interval: tuple[float, float], n: int = 160, **more: Any) -> dict[str, Any]:
    """A row whose difference to its control, of ASR as of over-refusal, has this interval."""
    low, high = interval
    found = {"value": (low + high) / 2, "interval": [low, high], "half_width": (high - low) / 2}
    differences = {"control": {key: {**found, "n": n} for key in ("asr", "over_refusal")}}
    return {"aim": "keep", "subject": "tuned", "differences": differences, **more}


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((-0.18, -0.06), "yes"),
        ((-0.15, 0.03), "undecided"),
        ((-0.04, 0.03), "no"),  # it excludes a useful difference
        ((-0.03, -0.003), "no"),  # there is one, and nobody has a use of it
        ((0.01, 0.2), "no"),
        ((-0.05, 0.0), "undecided"),  # an end that just reaches what is of use
    ],
)
def test_a_verdict_is_read_off_the_interval(interval: tuple[float, float], expected: str) -> None:
    assert verdict(row(interval))["beats_control"] == expected
    # What finds refusals should raise the ASR: the same interval, mirrored, says the same.
    mirrored = row((-interval[1], -interval[0]), aim="remove", subject="aligned")
    assert verdict(mirrored)["beats_control"] == expected


def test_a_verdict_is_about_what_the_method_is_for() -> None:
    running = row((-0.2, -0.1), aim="relax", subject="aligned")
    running["differences"]["control"]["asr"] = None
    found = verdict(running)
    assert (found["of"], found["wanted"], found["beats_control"]) == (
        "over_refusal", "lower", "yes",
    )  # fmt: skip
    attack = verdict(row((0.1, 0.2), aim="remove", subject="aligned"))
    assert (attack["of"], attack["wanted"], attack["beats_control"]) == ("asr", "higher", "yes")
    restoring = row((-0.2, -0.1), subject="tuned")
    assert verdict(restoring)["of"] == "asr"


def test_what_stopped_short_or_has_no_control_is_undecided() -> None:
    assert verdict(row((-0.2, -0.1), reached=False))["beats_control"] == "undecided"
    assert verdict(row((-0.01, 0.01), reached=False))["beats_control"] == "no"
    alone = verdict(row((-0.2, -0.1), differences={"none": {}}))
    assert (alone["beats_control"], alone["smallest_difference"]) == ("undecided", None)


def test_few_requests_show_no_no() -> None:
    """One of 24 that changed has a narrow interval, and none a wider one: both say little."""
    one = torch.zeros(24, 3)
    one[0, 0] = 1
    for changed in (one, -one, torch.zeros(24, 3)):
        found = measured_difference(changed, torch.zeros(24, 3), "points")
        few = row((0, 0), differences={"control": {"asr": found}})
        assert verdict(few)["beats_control"] == "undecided"
        # Ten times as many requests, of which as large a share changed, do show it.
        found = measured_difference(changed.repeat(10, 1), torch.zeros(240, 3), "points")
        many = row((0, 0), differences={"control": {"asr": found}})
        assert verdict(many)["beats_control"] == "no"
    # Nor is a difference shown that is of no use.
    assert verdict(row((-0.03, -0.003), n=24))["beats_control"] == "undecided"


def test_a_control_that_stopped_short_shows_no_no() -> None:
    short = {"reached": False}
    assert verdict(row((-0.01, 0.01), control=short))["beats_control"] == "undecided"
    assert verdict(row((-0.2, -0.1), control=short))["beats_control"] == "yes"


def test_the_smallest_difference_is_seen_by_four_runs_of_five() -> None:
    """As a normal estimate, and where few requests change: as counts."""
    half, normal = 0.06, NormalDist()
    smallest = verdict(row((-0.1 - half, -0.1 + half)))["smallest_difference"]
    error = half / normal.inv_cdf(0.975)
    assert normal.cdf(smallest / error - normal.inv_cdf(0.975)) == pytest.approx(0.8, abs=1e-3)
    n = 160
    rare = verdict(row((0.0, 0.0), n))["smallest_difference"]
    # A bootstrap excludes 0 where fewer than 2.5 % of resamples have none of those that changed.
    needed = next(k for k in range(1, n) if (1 - k / n) ** n < 0.025)
    missed = sum(comb(n, k) * rare**k * (1 - rare) ** (n - k) for k in range(needed))
    assert 1 - missed == pytest.approx(0.8, abs=0.02)


# ------------------------------------------------------------------------------ recommendation


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return comparison(requests=32)


def only(found: dict[str, Any], *names: str, **changes: dict[str, float]) -> dict[str, Any]:
    """The comparison of these methods alone; ``changes`` are other means of a method."""
    rows = [each for each in found["rows"] if each["method"] in names]
    rows = [{**each, "mean": each["mean"] | changes.get(each["method"], {})} for each in rows]
    return {**found, "rows": rows}


def test_the_lowest_asr_that_costs_little_is_recommended(found: dict[str, Any]) -> None:
    # safe-lora is lower still, and loses most of the task.
    told = recommend(found)
    assert told["method"] == "interpolation"
    by_name = {each["method"]: each for each in found["rows"]}
    best = by_name["interpolation"]
    low, high = best["differences"]["control"]["asr"]["interval"]
    for figure in (
        f"{best['mean']['asr']:.1%}", f"{found['intact']['asr']:.1%} before",
        f"{found['tuned']['mean']['asr']:.1%} after", f"{-100 * high:.1f} to {-100 * low:.1f}",
        f"{best['mean']['task_loss']:.3f} nats",
    ):  # fmt: skip
        assert figure in told["sentence"]
    assert told["sentence"].count(". ") == 0  # one sentence


@pytest.mark.parametrize("key", ["over_refusal", "utility_loss", "task_loss"])
def test_what_costs_too_much_is_not_recommended(found: dict[str, Any], key: str) -> None:
    models = (found["intact"], found["tuned"]["mean"])
    highest = models[1][key] if key == "task_loss" else max(model[key] for model in models)
    for more, name in ((0.04, "sppft"), (0.06, None)):
        told = recommend(only(found, "sppft", sppft={key: highest + more}))
        assert told["method"] == name
    assert f"costs {'+6.0 points' if key == 'over_refusal' else '+0.060 nats'}" in told["sentence"]


def test_of_equals_the_cheapest_is_recommended(found: dict[str, Any]) -> None:
    both = only(found, "sppft", "interpolation", interpolation={"asr": 0.16}, sppft={"asr": 0.2})
    assert recommend(both)["method"] == "sppft"  # nothing is applied: 3 seconds less
    assert "cheapest of 2" in recommend(both)["sentence"]
    both["rows"][1]["cost"] = both["rows"][1]["cost"] | {"seconds_per_token_ratio": 1.2}
    assert recommend(both)["method"] == "interpolation"
    assert recommend(only(both, "sppft", "interpolation", sppft={"asr": 0.22}))["method"] == (
        "interpolation"
    )


def test_none_is_justified(found: dict[str, Any]) -> None:
    told = recommend(only(found, "ssah-freezing", "random-freezing", "ssah-ablation"))
    assert told["method"] is None
    # What attacks is no candidate: two methods, of which neither beats its control.
    assert "none of 2 methods" in told["sentence"]
    lowest = min(each["mean"]["asr"] for each in found["rows"] if "freezing" in each["method"])
    assert f"the lowest is {lowest:.1%}" in told["sentence"]
    nothing = recommend(only(found, "ssah-ablation"))
    assert nothing["method"] is None
    assert "no method that keeps refusals was run" in nothing["sentence"]


def test_who_tries_many_methods_must_show_more(found: dict[str, Any]) -> None:
    alone = only(found, "sppft")
    row = alone["rows"][0]
    # 2.18 standard errors below its control: chance for one of 20 methods, and not for one alone.
    close = row["differences"]["control"]["asr"] | {
        "value": -0.1, "interval": [-0.19, -0.01], "half_width": 0.09,
    }  # fmt: skip
    row["differences"] = row["differences"] | {"control": {"asr": close}}
    assert recommend(alone)["method"] == "sppft"
    others = only(found, "random-freezing")["rows"] * 19
    told = recommend({**alone, "rows": [row, *others]})
    assert told["method"] is None
    assert "sppft may have beaten" in told["sentence"]
    assert "one of 20 methods" in told["sentence"]
    # By chance one alone lies so far out in 1.5 % of comparisons, and one of 20 in a quarter.
    chance = 1 - NormalDist().cdf(0.1 / (0.09 / 1.96))
    assert chance < 0.025 < 1 - (1 - chance) ** 20


def test_where_fine_tuning_does_no_harm_there_is_nothing_to_keep(found: dict[str, Any]) -> None:
    after = found["tuned"]["mean"] | {"asr": found["intact"]["asr"] + 0.04}
    harmless = only(found, "random-freezing") | {"tuned": {"mean": after}}
    assert recommend(harmless)["sentence"].endswith("fine-tuning takes hardly any refusal away.")


def test_a_control_that_does_harm_is_not_enough_to_beat(found: dict[str, Any]) -> None:
    alone = only(found, "sppft")
    rate = alone["rows"][0]["differences"]["none"]["asr"] | {"interval": [-0.1, 0.1]}
    less = alone["rows"][0]["differences"] | {"none": {"asr": rate}}
    alone["rows"][0]["differences"] = less
    assert recommend(alone)["method"] is None
