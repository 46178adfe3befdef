"""Moments of rows, and what two draws of them have in common."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny_studies import SOURCES, tree

import ssah
from ssah.data import DataError, encode, load_rows, make_loader
from ssah.models import load_model
from ssah.studies.stability import StabilitySettings, run_stability
from ssah.studies.stability.draws import Draws, chance_overlap, jaccard, spearman
from ssah.studies.stability.row_moments import RowMoments, row_moments
from ssah.units import UnitSet


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
    found = run_stability(loading, tmp_path, settings, **SOURCES)["result"]
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
    assert run_stability(loading, tmp_path, settings, **SOURCES)["result"] == found
    assert tree(tmp_path / "steps") == before
    more = dataclasses.replace(settings, sizes=(9,))
    with pytest.raises(
        DataError,
        match="safety has 16 rows that differ in their prompt; two disjoint draws of 9 need 18",
    ):
        run_stability(loading, tmp_path / "other", more, **SOURCES)


def test_no_two_rows_of_a_pair_of_draws_have_the_same_prompt(tmp_path, monkeypatch):
    drawn: list[list[int]] = []

    def scores(self, rows=None):
        drawn.append(rows.tolist())
        return {"layer": self.mean["layer"][rows].sum(0)}

    monkeypatch.setattr(RowMoments, "scores", scores)
    # Rows 0, 3, 6, ... have prompt 0, and so on: three prompts of four rows each.
    prompts = {role: ["abc"[row % 3] for row in range(12)] for role in ("safety", "utility")}
    for role in prompts:
        moments = torch.rand(12, 8, dtype=torch.float64)
        RowMoments(
            {"layer": torch.full((12,), 5.0, dtype=torch.float64)},
            {"layer": moments},
            {"layer": moments.clone()},
            {"layer": moments[0].clone()},
        ).save(tmp_path / role)
    settings = StabilitySettings(sizes=(1,), resamples=1, scu=0.2, ucu=0.2, ru=0.2)
    draws = Draws(tmp_path, settings, prompts)
    for number in range(20):
        draws.pair(1, number)
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        assert len(first) == len(second) == 1
        assert first[0] % 3 != second[0] % 3
    # Every row of a prompt has its turn.
    assert len({row for rows in drawn for row in rows}) > 6


def test_prompts_that_repeat_count_once(loading, tmp_path):
    rows = load_rows("builtin:safety[0:8]")
    answers = [dict(row, completion=f"{row['completion']} ({n})") for n in range(2) for row in rows]
    path = tmp_path / "safety.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in answers))
    settings = StabilitySettings(sizes=(5,), resamples=1)
    with (
        pytest.warns(UserWarning, match="8 of 16 rows repeat a prompt"),
        pytest.raises(DataError, match="safety has 8 rows that differ in their prompt"),
    ):
        run_stability(
            loading, tmp_path / "run", settings, safety=str(path), utility=SOURCES["utility"]
        )
