"""Weights put back: units by masks made from find_modules alone, names, everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plans import draw, masks
from safetensors.torch import load_file, save_file
from tuned import FAMILIES, assert_same_state, loaded, pair, saved

import ssah
from ssah import deltas
from ssah.units import UnitSet


@pytest.mark.parametrize("name", FAMILIES)
def test_units_are_put_back_and_nothing_else(name: str, tmp_path: Path) -> None:
    base, tuned = pair(name, torch.bfloat16)
    units = draw(base)
    stays = masks(base, units, "freeze")  # 1 where freezing these units lets a weight train
    expected = dict(tuned.state_dict())
    for key, before in base.named_parameters():
        expected[key] = torch.where(stays[key] == 1, tuned.get_parameter(key), before)
    assert sum(int((mask == 0).sum()) for mask in stays.values()) > 1000
    assert_same_state(deltas.rewind(base, tuned, units), expected)  # type: ignore[arg-type]
    # Mixtral's files keep three matrices for each expert.
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    deltas.rewind(*folders, units, out=tmp_path / "out")
    assert_same_state(loaded(tmp_path / "out"), expected)
    ssah.verify(tmp_path / "out", folders[0], units)
    with pytest.raises(RuntimeError, match="are not those of the base"):
        ssah.verify(folders[1], folders[0], units)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_put_back_is_the_base(name: str, tmp_path: Path) -> None:
    base, tuned = pair(name)
    everything = list(dict(base.named_children()))
    assert_same_state(deltas.rewind(base, tuned, everything), base.state_dict())  # type: ignore[arg-type]
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    deltas.rewind(*folders, everything, out=tmp_path / "out")
    assert_same_state(loaded(tmp_path / "out"), base.state_dict())


def test_names_are_parameters_modules_and_layers_and_go_with_units() -> None:
    base, tuned = pair("llama_tied")
    units = UnitSet({"model.layers.0.mlp.down_proj": [5]}, {"model.layers.0.mlp.down_proj": 72})
    names = ["model.layers.1", "model.norm.weight", "lm_head"]  # which is tied to the embedding
    found: Any = deltas.rewind(base, tuned, [*names, units])
    after, before = tuned.state_dict(), base.state_dict()
    for key in after:
        if key.startswith("model.layers.1.") or key in (
            "model.norm.weight",
            "lm_head.weight",
            "model.embed_tokens.weight",
        ):
            assert found[key].equal(before[key]), key
        elif not key.startswith("model.layers.0.mlp"):
            assert found[key].equal(after[key]), key
    down = "model.layers.0.mlp.down_proj.weight"
    assert found[down][:, 5].equal(before[down][:, 5])
    assert found[down][:, 4].equal(after[down][:, 4])
    # model.layers.1 is no beginning of the name of a layer 10.
    deep = {f"model.layers.{i}.w": torch.zeros(2) for i in (1, 10)}
    moved = {name: torch.ones(2) for name in deep}
    kept: Any = deltas.rewind(deep, moved, "model.layers.1")
    assert [kept[name].tolist() for name in deep] == [[0, 0], [1, 1]]


def test_a_module_by_its_name_in_the_model_is_found_in_files_that_call_it_otherwise(
    tmp_path: Path,
) -> None:
    base, tuned = pair("mixtral")
    name = "model.layers.0.mlp"  # block_sparse_moe in the files
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    deltas.rewind(*folders, name, out=tmp_path / "out")
    assert_same_state(loaded(tmp_path / "out"), deltas.rewind(base, tuned, name))  # type: ignore[arg-type]


def test_files_that_keep_experts_undivided_are_rewound_too(tmp_path: Path) -> None:
    base, tuned = pair("mixtral")
    units = draw(base)
    folders = [saved(model, tmp_path / name) for model, name in ((base, "base"), (tuned, "tuned"))]
    for folder, model in zip(folders, (base, tuned), strict=True):
        save_file(model.state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
    deltas.rewind(folders[0], folders[1], units, out=tmp_path / "out")
    assert "model.layers.0.mlp.experts.down_proj" in load_file(tmp_path / "out/model.safetensors")
    assert_same_state(loaded(tmp_path / "out"), deltas.rewind(base, tuned, units))  # type: ignore[arg-type]


def test_wrong_selections_are_refused() -> None:
    base, tuned = pair("llama_tied")
    other = draw(pair("gpt2")[0])
    for selection, error, message in (
        ("model.layers.7", ValueError, "'model.layers.7', which is no parameter and no module"),
        ([], ValueError, "selection is empty"),
        (UnitSet({}, {"model.layers.0.mlp.down_proj": 72}), ValueError, "selection is empty"),
        (other, ValueError, "units has modules that the model .* lacks"),
        ([3], TypeError, "selection has int; it must have UnitSets, Selections and names"),
    ):
        with pytest.raises(error, match=message):
            deltas.rewind(base, tuned, selection)  # type: ignore[arg-type]
    states: Any = base.state_dict(), tuned.state_dict()
    with pytest.raises(TypeError, match=r"is a state dict, .* pass the model"):
        deltas.rewind(*states, draw(base))
