"""UnitGroups: summary, repr and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import torch
from group_scores import attribution
from transformers import LlamaConfig, LlamaForCausalLM

from ssah.attribution import Attribution
from ssah.groups import UnitGroups, classify
from ssah.storage import save_tensors
from ssah.units import find_modules, model_name, units_hash


def test_summary_is_plain_data() -> None:
    safety = {"m.0.o": torch.arange(4.0), "m.0.down": torch.arange(8.0), "x": torch.arange(4.0)}
    zero = {name: torch.zeros_like(x) for name, x in safety.items()}
    summary = classify(safety, zero, scu=0.25, ucu=0.25, ru=0.25).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["units"] == 16
    assert summary["groups"]["scu"] == {"units": 4, "fraction": 0.25}
    assert summary["modules"][1] == {
        "module": "m.0.down", "layer": 0, "units": 8, "scu": 2, "ucu": 2, "ru": 2, "cu": 2
    }  # fmt: skip
    assert summary["layers"] == [
        {"layer": 0, "units": 12, "scu": 3, "ucu": 3, "ru": 3, "cu": 3},
        {"layer": None, "units": 4, "scu": 1, "ucu": 1, "ru": 1, "cu": 1},
    ]


def test_repr_says_what_is_in_it() -> None:
    scores = {"a": torch.arange(4.0)}
    text = repr(classify(scores, scores, scu=0.25, ucu=0, ru=0.5))
    assert "scu=1 (25.00%)" in text
    assert "4 units in 1 modules, scope='model', normalize='zscore'" in text


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=11,  # layers.10 sorts before layers.2 in a file
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
        )
    )


def attributions(model: LlamaForCausalLM) -> list[Attribution]:
    generator = torch.Generator().manual_seed(0)
    return [
        attribution(
            {
                name: torch.randint(0, 9, (module.n_units,), generator=generator).double()
                for name, module in find_modules(model).items()
            },
            model_name=model_name(model),
            units_hash=units_hash(model),
            data_fingerprint=part,
        )
        for part in ("harm", "help")
    ]


@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("normalize", ["none", "zscore", "rank"])
def test_saved_groups_are_the_same(
    llama: LlamaForCausalLM, tmp_path: Any, scope: Any, normalize: Any
) -> None:
    groups = classify(
        *attributions(llama), scu=0.1, ucu=0.2, ru=0.3, scope=scope, normalize=normalize
    )
    groups.save(tmp_path / "groups")
    again = UnitGroups.load(tmp_path / "groups", model=llama)
    assert again == groups
    assert list(again.sizes.items()) == list(groups.sizes.items())
    assert (again.metadata, again.shares) == (groups.metadata, groups.shares)
    for by in ("safety", "utility", "difference", "sum"):
        assert again.top("cu", 0.13, by=by) == groups.top("cu", 0.13, by=by)
    assert not list((tmp_path / "groups").glob("*.p*k*l*"))


def test_groups_of_another_model_are_refused(llama: LlamaForCausalLM, tmp_path: Any) -> None:
    other = LlamaForCausalLM(
        LlamaConfig(**{**llama.config.to_dict(), "rope_parameters": None, "num_hidden_layers": 10})
    )
    classify(*attributions(llama), scu=0.1, ucu=0.2, ru=0.3).save(tmp_path)
    with pytest.raises(ValueError, match=r"unit groups was made on .*its units are others"):
        UnitGroups.load(tmp_path, model=other)
    plain = [each.scores for each in attributions(llama)]
    classify(*plain, scu=0.1, ucu=0.2, ru=0.3).save(tmp_path)
    assert UnitGroups.load(tmp_path, model=llama).metadata["model_name"] is None
    with pytest.raises(ValueError, match=r"lacks: .*layers\.10\."):
        UnitGroups.load(tmp_path, model=other)


def test_scores_that_share_memory_can_be_saved(tmp_path: Any) -> None:
    whole = torch.arange(8.0, dtype=torch.float64)
    scores = {"a": whole[:4], "b": whole[4:], "c": whole}
    groups = classify(scores, scores, scu=0, ucu=0, ru=0.25)
    groups.save(tmp_path)
    whole.zero_()
    assert groups.safety["a"].tolist() == [0, 1, 2, 3]
    assert UnitGroups.load(tmp_path) == groups


def test_attributions_from_files_give_the_same_groups(
    llama: LlamaForCausalLM, tmp_path: Any
) -> None:
    both = attributions(llama)
    for each in both:
        each.save(tmp_path / each.data_fingerprint)
    again = [Attribution.load(tmp_path / name, model=llama) for name in ("harm", "help")]
    shares = {"scu": 0.1, "ucu": 0.2, "ru": 0.3}
    assert classify(*again, **shares, scope="model") == classify(*both, **shares, scope="model")


def test_what_is_no_group_is_refused(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was saved"):
        UnitGroups.load(tmp_path)
    save_tensors(tmp_path, {"scores/a": torch.zeros(3)}, {"metric": "variance"})
    with pytest.raises(ValueError, match="must hold 'ssah unit groups'"):
        UnitGroups.load(tmp_path)


def test_groups_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_hub.use_folder(monkeypatch, tmp_path)
    about = {"model_name": "/home/someone/secret-project", "units_hash": None}
    scores = {"model.layers.0.mlp.down_proj": torch.arange(10.0, dtype=torch.float64)}
    groups = classify(
        attribution(scores, data_fingerprint="5afe", **about),
        attribution({n: x.flip(0) for n, x in scores.items()}, data_fingerprint="a11", **about),
        scu=0.2,
        ucu=0.2,
        ru=0.1,
    )
    with pytest.raises(ValueError, match=r"figures\['refused'\] is 0.5, must have a rate"):
        groups.push_to_hub("me/groups", figures={"refused": 0.5})
    assert not list(tmp_path.iterdir())
    figure = {"value": 0.5, "interval": (0.4, 0.6)}
    address = groups.push_to_hub("me/groups", figures={"refused": figure}, private=True)
    assert address == "https://example.test/me/groups"
    card = (tmp_path / "README.md").read_text()
    for line in (
        'base_model: "secret-project"',
        "| units in scu | `2 (20.00%)` |",
        "| fingerprint of the safety data | `5afe` |",
        "| fingerprint of the utility data | `a11` |",
        "| hash of the units | not known |",
        "| refused | 0.5 | 0.4 to 0.6 |  |",
    ):
        assert line in card.splitlines()
    for file in tmp_path.iterdir():
        assert b"/home" not in file.read_bytes()
    found = UnitGroups.load("hf:me/groups")
    assert dict(found) == dict(groups)
    assert found.metadata["model_name"] == "secret-project"
    with pytest.raises(FileNotFoundError, match="write 'hf:me/groups'"):
        UnitGroups.load("me/groups")


@pytest.mark.parametrize(("name", "why"), [("hf:me/groups", "snapshot"), ("hf:", "Repo id")])
def test_groups_that_cannot_be_fetched_are_named(
    name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"'{name}' could not be fetched .*{why}"):
        UnitGroups.load(name)
