"""``ssah weights`` does what the library does, and refuses what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_chat
import torch
from commands import as_json, fails

import ssah
from ssah.data import make_loader
from ssah.models import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_chat.save(folder / "model")
    return folder


def test_scores_are_those_of_the_library(folder: Path, tmp_path: Path) -> None:
    rows = ("--data", "builtin:safety", "--limit", 4)
    only = ("--parameters", "*.mlp.*", "--metric", "fisher")
    told = as_json("weights", folder / "model", *rows, *only, "--out", tmp_path)
    model, tokenizer = load_model(str(folder / "model"))
    loader = make_loader("builtin:safety", tokenizer, limit=4)
    expected = ssah.attribute_weights(model, loader, metric="fisher", parameters="*.mlp.*")
    found = ssah.WeightAttribution.load(tmp_path, model)
    assert list(found.scores) == list(expected.scores)
    assert all(torch.equal(found.scores[p], score) for p, score in expected.scores.items())
    assert told["weights"] == sum(score.numel() for score in expected.scores.values())
    assert (told["count"], told["metric"]) == (4, "fisher")


def test_magnitudes_take_no_data_and_wanda_leaves_none(folder: Path, tmp_path: Path) -> None:
    words = ("weights", folder / "model", "--out", tmp_path)
    assert as_json(*words, "--metric", "magnitude")["count"] == 0
    rows = ("--data", "builtin:safety", "--limit", 2)
    assert as_json(*words, "--metric", "wanda", *rows)["count"] > 2  # tokens; it takes the place
    assert not (tmp_path / "unfinished").exists()
    for more in (("--metric", "magnitude", "--data", "builtin:safety"), ("--metric", "wanda")):
        assert "--data is for every metric but magnitude" in fails(*words, *more)


def test_the_highest_scores_are_a_selection(folder: Path, tmp_path: Path) -> None:
    as_json("weights", folder / "model", "--metric", "magnitude", "--out", tmp_path)
    model = load_model(str(folder / "model"))[0]
    for text, per in (("0.1", "matrix"), ("0.1:row", "row"), ("1e-1:model", "model")):
        chosen = ssah.select(model, f"weights:{tmp_path}:{text}")
        kept = {name: chosen.mask(name).expand_as(model.get_parameter(name)) for name in chosen}
        every = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in kept])
        edge = every.sort(descending=True).values[round(0.1 * len(every)) - 1]
        for name, mask in kept.items():
            weight = model.get_parameter(name).detach().abs()
            lines = {"row": weight, "matrix": weight.view(1, -1), "model": weight.view(1, -1)}[per]
            if per == "model":
                wanted = lines >= edge
            else:
                n = int(0.1 * lines.shape[1] + 0.5)
                wanted = lines >= lines.sort(1, descending=True).values[:, n - 1 : n]
            assert torch.equal(mask, wanted.view(weight.shape)), name
    for wrong, message in ((":2", "has the share 2"), (":0.1.2", "must be a number")):
        with pytest.raises(ValueError, match=message):
            ssah.select(model, f"weights:{tmp_path}{wrong}")
    with pytest.raises(FileNotFoundError):
        ssah.select(model, "weights:nowhere:0.1")
