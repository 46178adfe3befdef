"""A folder with an update, in the place of a model: its base is found, checked and changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny_chat
import torch
from commands import as_json, fails
from evaluations import SMALL, evaluate
from plans import assert_equal, snapshot
from torch import Tensor

import ssah
from ssah.data import load_requests, make_loader
from ssah.evaluation import refusal_margin
from ssah.models import ModelError, load_model
from ssah.models.weights import weights_hash
from ssah.studies.loading import Loading
from ssah.training import is_update, load_trained, load_trained_tokenizer
from ssah.units import UnitSet, find_modules

pytestmark = pytest.mark.xdist_group("updated models")  # its fixtures are made once

DOWN = "model.layers.0.mlp.down_proj"


def train(source: str, update: Path, lr: float, dtype: str = "auto") -> dict[str, Tensor]:
    """Save an update of a model after two steps on units 0 to 4, and give the trained weights."""
    model, tokenizer = load_trained(source, dtype=dtype)
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    with ssah.train_only(model, UnitSet({DOWN: torch.arange(5)}, sizes)) as plan:
        optimizer = plan.optimizer(lr=lr)
        for batch in make_loader("builtin:utility_eval", tokenizer, batch_size=2, limit=4):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        plan.save_pretrained(update)
    return snapshot(model)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``update``, and ``whole``, what the update stands for."""
    folder = tmp_path_factory.mktemp("updated")
    tiny_chat.save(folder / "base")
    weights = train(str(folder / "base"), folder / "update", lr=0.01)
    whole, tokenizer = load_model(str(folder / "base"))
    whole.load_state_dict(weights)
    whole.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "whole")
    return folder


def moved(place: Path, tmp_path: Path) -> Path:
    """The same update, whose base was moved from ``base`` to ``elsewhere``."""
    shutil.copytree(place / "base", tmp_path / "base")
    train(str(tmp_path / "base"), tmp_path / "update", lr=0.01)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    return tmp_path


def test_it_is_the_trained_model(place: Path) -> None:
    model, tokenizer = load_trained(str(place / "update"))
    whole, _ = load_model(str(place / "whole"))
    assert_equal(snapshot(model), snapshot(whole))
    assert model.config.name_or_path == str(place / "update")
    assert not model.training
    assert tokenizer.get_vocab() == load_trained_tokenizer(str(place / "update")).get_vocab()
    half, _ = load_trained(str(place / "update"), dtype="bfloat16")
    # Merged as it was trained, and only then converted.
    assert_equal(snapshot(half), snapshot(whole.bfloat16()))
    ordinary, _ = load_trained(str(place / "whole"))
    assert_equal(snapshot(ordinary), snapshot(load_model(str(place / "whole"))[0]))


def test_an_update_of_an_update_in_another_dtype(place: Path, tmp_path: Path) -> None:
    weights = train(str(place / "update"), tmp_path / "second", lr=0.1, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"was trained from other weights than .*update"):
        load_trained(str(tmp_path / "second"), base=str(place / "base"))
    model, _ = load_trained(str(tmp_path / "second"))
    assert model.dtype == torch.bfloat16
    assert_equal(snapshot(model), weights)
    assert load_trained_tokenizer(str(tmp_path / "second")).get_vocab()


def test_the_base_may_be_elsewhere_and_must_be_the_one(place: Path, tmp_path: Path) -> None:
    update = str(moved(place, tmp_path) / "update")
    for load in (load_trained, load_trained_tokenizer):
        with pytest.raises(ModelError, match=r"base of the update .* cannot be loaded: .*--base"):
            load(update)
    model, _ = load_trained(update, base=str(tmp_path / "elsewhere"))
    assert_equal(snapshot(model), snapshot(load_model(str(place / "whole"))[0]))
    # `whole` differs from the base in trained entries alone, which merging would overwrite.
    with pytest.raises(ValueError, match=r"hash was [0-9a-f]{12}, is [0-9a-f]{12}.*--base"):
        load_trained(update, base=str(place / "whole"))


def test_what_makes_no_sense_is_refused(place: Path, tmp_path: Path) -> None:
    base, update = str(place / "base"), str(place / "update")
    for load in (load_trained, load_trained_tokenizer):
        with pytest.raises(ModelError, match=r"base is .* must not be given: .* is no update"):
            load(base, base=base)
        with pytest.raises(ModelError, match="the update itself"):
            load(update, base=update)
    with pytest.raises(ModelError, match="packed is True, must be False"):
        load_trained(update, packed=True)
    with pytest.raises(
        ModelError, match=r"holds 'update' and no whole model.* what --merge writes"
    ):
        load_model(update)
    shutil.copytree(place / "update", tmp_path / "run")
    (tmp_path / "run" / "merged").mkdir()
    with pytest.raises(ModelError, match=r"give '.*run/merged'"):
        load_model(str(tmp_path / "run"))


def test_a_whole_model_in_the_folder_counts(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "both")
    shutil.copytree(place / "update", tmp_path / "both", dirs_exist_ok=True)
    assert not is_update(str(tmp_path / "both"))
    assert is_update(str(place / "update"))


def test_an_update_on_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo: str) -> str:
        asked.append(repo)
        return str(place / "update")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = load_trained("hf:me/update")
    assert_equal(snapshot(model), snapshot(load_model(str(place / "whole"))[0]))
    assert asked == ["me/update"]


def test_another_model_of_a_study_has_its_own_base(place: Path, tmp_path: Path) -> None:
    update = str(moved(place, tmp_path) / "update")
    loading = Loading(update, base=str(tmp_path / "elsewhere"))
    first, _ = loading("auto")
    second, _ = loading("auto", str(place / "base"))
    assert (first.state_dict()[f"{DOWN}.weight"] != second.state_dict()[f"{DOWN}.weight"]).any()
    assert (
        loading.tokenizer(update).get_vocab() == loading.tokenizer(str(place / "base")).get_vocab()
    )


def test_commands_take_it(place: Path, tmp_path: Path) -> None:
    data = ("--data", "builtin:utility_eval", "--limit", 3)
    by_update, by_whole = (
        as_json("attribute", place / name, *data, "--out", tmp_path / name)
        for name in ("update", "whole")
    )
    assert by_update.pop("model") == str(place / "update")
    for each in (by_update, by_whole):
        del each["seconds"], each["out"]
        each.pop("model", None)
    assert by_update == by_whole
    ours, theirs = (ssah.Attribution.load(tmp_path / name) for name in ("update", "whole"))
    assert all(torch.equal(ours.scores[name], theirs.scores[name]) for name in ours.scores)

    given = ("--out", tmp_path / "x", *data)
    assert "--base is for a model in memory" in fails(
        "attribute", place / "update", *given, "--stream", "--base", place / "base"
    )
    assert "holds 'update' and no whole model" in fails(
        "attribute", place / "update", *given, "--stream"
    )


def test_an_evaluation_takes_it(place: Path, tmp_path: Path) -> None:
    folder = moved(place, tmp_path)
    given = (folder / "update", "--out", tmp_path / "out", *SMALL)
    found = evaluate(*given, "--base", folder / "elsewhere")
    whole, tokenizer = load_model(str(place / "whole"), dtype="float32")
    assert found["settings"]["weights"] == weights_hash(whole)
    requests = load_requests("builtin:safety_eval[0:7]")
    margin = refusal_margin(whole, tokenizer, requests, batch_size=4)
    assert found["result"]["models"][0]["refusal_margin"] == pytest.approx(margin, abs=1e-9)
    # Where the base is does not matter for going on.
    (folder / "elsewhere").rename(folder / "base")
    assert evaluate(*given)["result"] == found["result"]


def test_verify_takes_it(place: Path) -> None:
    sizes = {DOWN: find_modules(load_model(str(place / "base"))[0])[DOWN].n_units}
    stayed, trained = (UnitSet({DOWN: torch.tensor([unit])}, sizes) for unit in (5, 4))
    ssah.verify(place / "update", place / "base", stayed)
    with pytest.raises(RuntimeError, match="not those of the base model"):
        ssah.verify(place / "update", load_model(str(place / "base"))[0], trained)
