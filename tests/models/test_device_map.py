"""Models that are dealt to several places: here the memory of the CPU and a folder on disk."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from commands import call, fails
from transformers import PreTrainedModel

import ssah
from ssah.data import load_rows, make_loader
from ssah.evaluation import answers
from ssah.interventions import Add, Scale, Zero
from ssah.models import ModelError, load_model, loading
from ssah.studies import Loading
from ssah.studies.training import BudgetSettings, run_budget

# One layer in memory, the other on disk, as where a GPU holds a part of the model.
PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def test_a_dealt_model_is_scored_ablated_and_measured_as_one_in_memory(
    tiny_chat_folder: Path, tmp_path: Path
) -> None:
    whole, tokenizer = load_model(str(tiny_chat_folder), device="cpu")
    dealt, _ = load_model(
        str(tiny_chat_folder), device_map=PLACES, offload_folder=tmp_path / "offload"
    )
    elsewhere = {name for name, each in dealt.named_parameters() if each.is_meta}
    assert elsewhere
    assert all(name.startswith("model.layers.1.") for name in elsewhere)
    assert not dealt.training
    rows = load_rows("builtin:safety[0:6]")
    loader = make_loader(rows, tokenizer, batch_size=3)
    expected, found = (ssah.attribute(model, loader) for model in (whole, dealt))
    for name, scores in expected.scores.items():
        assert torch.equal(found.scores[name], scores), name
    sizes = {name: len(scores) for name, scores in expected.scores.items()}
    units = ssah.units.UnitSet.random(12, sizes, seed=1)
    tokens = torch.arange(3, 9)[None]  # [1, 6]
    with torch.no_grad(), ssah.ablate(whole, units), ssah.ablate(dealt, units):
        assert torch.equal(dealt(tokens).logits, whole(tokens).logits)
    changes = (Scale(units, 0.5), Add([0, 1], torch.ones(whole.config.hidden_size), at="last"))
    with torch.no_grad(), ssah.intervene(whole, *changes), ssah.intervene(dealt, *changes):
        torch.testing.assert_close(dealt(tokens).logits, whole(tokens).logits)
    with pytest.raises(ValueError, match="float32 on meta, or packed; it must be"):
        ssah.intervene(dealt, Zero(sorted(elsewhere)))
    with pytest.raises(ValueError, match="on meta, must be a floating-point weight in memory"):
        ssah.freeze(dealt, units)


def test_a_model_answers_whose_embedding_is_offloaded(
    tiny_chat_folder: Path, tmp_path: Path
) -> None:
    whole, tokenizer = load_model(str(tiny_chat_folder), device="cpu")
    places = {**PLACES, "model.embed_tokens": "disk"}
    dealt, _ = load_model(str(tiny_chat_folder), device_map=places, offload_folder=tmp_path)
    assert dealt.get_input_embeddings().weight.is_meta
    asked = [answers(each, tokenizer, ["Why?"], max_new_tokens=4) for each in (whole, dealt)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device_map": "evenly"}, "device_map is 'evenly', must be one of auto, balanced"),
        ({"device_map": "auto", "device": "cpu"}, "device is 'cpu' and device_map 'auto'"),
        ({"offload_folder": "somewhere"}, "offload_folder is 'somewhere', must be left out"),
    ],
)
def test_a_map_that_means_nothing_is_refused(
    tiny_chat_folder: Path, given: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(tiny_chat_folder), **given)


def test_commands_deal_a_model(tiny_chat_folder: Path, tmp_path: Path) -> None:
    data = ("--data", "builtin:safety[0:4]", "--batch-size", 2)
    call("attribute", tiny_chat_folder, *data, "--out", tmp_path / "whole")
    call("attribute", tiny_chat_folder, *data, "--out", tmp_path / "dealt", "--device-map", "auto")
    expected, found = (
        ssah.Attribution.load(tmp_path / folder).scores for folder in ("whole", "dealt")
    )
    for name, scores in expected.items():
        assert torch.equal(found[name], scores), name
    line = fails(
        "attribute", tiny_chat_folder, *data, "--out", tmp_path / "s", "--device-map", "auto",
        "--stream",
    )  # fmt: skip
    assert "--device-map" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("finetune", "--data", "builtin:safety", "--freeze", "none"),
        ("align", "--data", "builtin:safety", "--train", "layers:0"),
        ("export", "--units", "heads:0.0"),
        ("diagnose", "--unaligned", "smollm2"),
        ("check", "smollm2"),
        ("demo",),
    ],
)
def test_a_command_for_whole_models_refuses_a_map_before_one_is_loaded(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    name, *options = command
    model = ("--model", "smollm2") if name == "demo" else ("smollm2",)
    where = ("--out", tmp_path / "out", "--device-map", "auto")
    with patch.object(PreTrainedModel, "from_pretrained", side_effect=AssertionError("loaded")):
        line = fails(name, *model, *options, *where)
    assert "device_map is 'auto'" in line
    assert "must be on one device; leave --device-map out" in line
    assert not [*tmp_path.rglob("*.safetensors")]


def test_a_map_of_modules_is_given_as_json(tiny_chat_folder: Path, tmp_path: Path) -> None:
    data = ("--data", "builtin:safety[0:4]", "--batch-size", 2, "--metric", "taylor")
    call("attribute", tiny_chat_folder, *data, "--out", tmp_path / "whole")
    with patch.object(loading, "whole", wraps=loading.whole) as loads:
        call(
            "attribute", tiny_chat_folder, *data, "--out", tmp_path / "dealt",
            "--device-map", json.dumps(PLACES), "--offload-folder", tmp_path / "offload",
        )  # fmt: skip
    assert loads.call_args.kwargs["device_map"] == PLACES
    expected, found = (
        ssah.Attribution.load(tmp_path / folder).scores for folder in ("whole", "dealt")
    )
    for name, scores in expected.items():
        assert torch.equal(found[name], scores), name
    line = fails(
        "attribute", tiny_chat_folder, *data, "--out", tmp_path / "s", "--device-map", "{0"
    )
    assert "--device-map is '{0', must be JSON where it begins with a brace" in line


def test_a_study_that_trains_refuses_a_map_before_anything_is_done(tmp_path: Path) -> None:
    dealt = Loading("smollm2", device_map="auto")
    with pytest.raises(ModelError, match="a model that trains must be on one device"):
        run_budget(
            dealt,
            tmp_path / "run",
            BudgetSettings(),
            safety="builtin:safety",
            utility="builtin:utility",
            requests=("builtin:safety_eval",),
            utility_eval="builtin:utility_eval",
            save_model=False,
        )
    assert not (tmp_path / "run").exists()
