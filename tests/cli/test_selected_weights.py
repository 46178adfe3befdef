"""Heads, layers and parameters on the command line: what is named stays, goes back, or is out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_chat
import torch
from commands import as_json, call, fails
from safetensors.torch import load_file
from tuned import loaded, saved, tuned_from

import ssah
from ssah import selections
from ssah.studies.evaluate.ablations import Ablation

QUICK = ("--max-steps", 2, "--batch-size", 2, "--lr", 1e-3, "--weight-decay", 0.1, "--limit", 4)
FROZEN = ("layers:0 - parameters:*norm*", "heads:1.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and one tuned from it."""
    folder = tmp_path_factory.mktemp("selected")
    tiny_chat.save(folder / "model")
    model = tuned_from(tiny_chat.model(), 1)
    tiny_chat.tokenizer().save_pretrained(saved(model, folder / "tuned"))
    return folder


def test_what_is_frozen_is_what_verify_proves(folder: Path, tmp_path: Path) -> None:
    frozen = [word for text in FROZEN for word in ("--freeze", text)]
    run = ("--data", "builtin:utility", *frozen, "--out", tmp_path / "run", *QUICK, "--merge")
    found = as_json("finetune", folder / "model", *run)
    base, after = tiny_chat.model(), loaded(tmp_path / "run" / "merged")
    chosen = ssah.select(base, FROZEN, shared="any")
    assert (found["weights"], found["weight_share"]) == (len(chosen), chosen.fraction)
    moved = 0
    for name, before in base.named_parameters():
        mask = chosen.mask(name).expand_as(before)
        assert torch.equal(after[name][mask], before[mask]), name
        moved += int((after[name] != before)[~mask].sum())
    # Head 1.2 reads rows of K and V that head 1.3 reads too: they stay.
    assert len(chosen) > len(ssah.select(base, FROZEN))
    assert moved > 1000
    texts = [word for text in FROZEN for word in ("--units", text)]
    both = (tmp_path / "run" / "merged", "--base", folder / "model")
    told = as_json("verify", *both, *texts)
    assert (told["equal"], told["weights"]) == (True, len(chosen))
    assert "are not those of the base model" in fails(
        "verify", *both, "--units", "layers:1", code=1
    )


def test_heads_are_put_back_and_taken_out(folder: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "rewound", tiny_chat.model()
    rewind = ("--rewind", "heads:1.0-1", "--rewind", "model.norm", "--out", out)
    as_json("delta", folder / "model", folder / "tuned", *rewind)
    chosen = ssah.select(base, "heads:1.0-1 + parameters:model.norm.weight")
    after, tuned = loaded(out), loaded(folder / "tuned")
    for name, before in base.named_parameters():
        mask = chosen.mask(name).expand_as(before)
        assert torch.equal(after[name], torch.where(mask, before, tuned[name])), name

    out = tmp_path / "adapter"
    as_json("export", folder / "model", "--units", "heads:1.0", "--out", out)
    config = json.loads((out / "adapter_config.json").read_text())
    (param,) = {name for name in load_file(out / "adapter_model.safetensors") if "lora_B" in name}
    assert "layers.1.self_attn.o_proj" in param  # its columns of O, and nothing else
    assert config["r"] == 32 // 4


def test_what_an_evaluation_takes_out() -> None:
    model = tiny_chat.model()
    each = Ablation.parse("heads:1.0 + layers:0")
    assert (str(each), each.source) == ("heads:1.0 + layers:0",) * 2
    assert each.chosen(model, 3) == ssah.select(model, "heads:1.0 + layers:0")
    drawn = Ablation.parse("heads:1.0:random")
    assert str(drawn) == "heads:1.0:random"
    one = ssah.select(model, "heads:1.0")
    assert drawn.chosen(model, 3) == selections.Selection.random(one, seed=3)
    for text, message in (
        ("heads:1.0 + scu", "joins a group with something else"),
        ("heads:1", "it must be one of scu"),
        ("head:1.0", "there is no folder 'head'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Ablation.parse(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("finetune", "--freeze", "layers:9"), "layers are 9, must be whole numbers from 0 to 1"),
        (("finetune", "--freeze", "layer:0"), "the selection has 'layer:0'; it must be one of scu"),
        (("finetune", "--freeze", "layers:0 + scu"), "groups is missing: give --groups DIR"),
        (("finetune", "--freeze", "layers:0", "--groups", "x"), "--freeze names none of scu"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: tuple[str, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    command, *options = words
    data = ("--data", "builtin:utility", "--out", tmp_path / "run", *QUICK)
    assert message in fails(command, folder / "model", *options, *data)


def test_single_weights_stay_and_are_put_back(folder: Path, tmp_path: Path) -> None:
    model, name = tiny_chat.model(), "model.layers.0.mlp.up_proj.weight"
    mask = torch.rand(model.get_parameter(name).shape) < 0.5
    chosen = selections.weights(model, {name: ssah.units.BitMask.of(mask)})
    chosen.save(tmp_path / "chosen")
    data = ("--data", "builtin:utility", "--out", tmp_path / "run", *QUICK, "--merge")
    call("finetune", folder / "model", "--freeze", f"weights:{tmp_path / 'chosen'}", *data)
    moved = loaded(tmp_path / "run" / "merged")[name] != model.get_parameter(name)
    assert not moved[mask].any()
    assert moved[~mask].any()
    out = tmp_path / "rewound"
    rewind = ("--rewind", f"weights:{tmp_path / 'chosen'}", "--out", out)
    call("delta", folder / "model", folder / "tuned", *rewind)
    expected = torch.where(mask, model.get_parameter(name), loaded(folder / "tuned")[name])
    assert torch.equal(loaded(out)[name], expected)
    ssah.verify(str(out), model, chosen)
    with pytest.raises(RuntimeError, match="up_proj"):
        ssah.verify(str(folder / "tuned"), model, chosen)
