"""Checkpoints that lack weights, are damaged, or hold more than the model takes; names as data."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_chat
import torch
from commands import SHARES, call, fails
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ssah.attribution import Attribution
from ssah.models import Checkpoint, ModelError, load_model, locate, quiet
from ssah.models.checks import loading_errors

LACKING = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(tiny_chat_folder, tmp_path / "model"))


def test_a_mistyped_folder_is_refused_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    folder.rename(tmp_path / "runs" / "aligned")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssah.models.source._is_cached", lambda name: name == "runs/cached")
    assert locate("runs/aligned").local
    for wrong, message in (
        ("runs/aligend", r"file \(there is 'runs/aligned'\), though there is a folder 'runs'; for"),
        ("runs/another", r"though there is a folder 'runs'; .* `hf download runs/another`"),
        ("./runs/alined", r"file \(there is 'runs/aligned'\), and it does not have the form of"),
        (str(tmp_path / "run" / "x"), r"no such folder or file, and it does not have the form of"),
    ):
        with pytest.raises(ModelError, match=message):
            locate(wrong)
    # What may be on the Hub alone is still looked for there.
    for name in ("gpt2", "openai-community/gpt2", "runs/cached"):
        assert not locate(name).local


def test_a_model_that_is_not_on_the_hub_may_be_a_mistyped_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    message = r"'modle' cannot be loaded: no folder here has that name \(there is 'model'\); on the"
    with pytest.raises(ModelError, match=message), loading_errors("modle"):
        raise OSError("not found")
    there = pytest.raises(ModelError, match=r"'model' cannot be loaded: not found$")
    with there, loading_errors("model"):
        raise OSError("not found")


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces tensors of the checkpoint; None removes one."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **change}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, file, {"format": "pt"})


def test_a_weight_that_is_missing_is_never_made_up(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, {LACKING: None})
    with pytest.raises(ModelError, match=f"lacks 1 of its weights, '{LACKING}'"):
        load_model(str(folder), device="cpu")
    line = fails("attribute", folder, "--data", "builtin:safety", "--out", tmp_path / "out")
    assert LACKING in line
    assert not (tmp_path / "out").exists()


def test_a_configuration_with_more_layers_than_the_checkpoint_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ModelError, match=r"'model\.layers\.2\.input_layernorm\.weight'"):
        load_model(str(folder), device="cpu")


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    rewrite(folder, {LACKING: torch.zeros(32, 65)})
    with pytest.raises(ModelError, match=LACKING.replace(".", r"\.")):
        load_model(str(folder), device="cpu")


def test_tensors_without_a_place_are_a_warning_that_quiet_shows(folder: Path) -> None:
    rewrite(folder, {"model.layers.7.adapter.weight": torch.zeros(2)})
    with (
        pytest.warns(UserWarning, match=r"1 tensors .* 'model\.layers\.7\.adapter\.weight'"),
        quiet(),
    ):
        model, _ = load_model(str(folder), device="cpu")
    whole = AutoModelForCausalLM.from_pretrained(tiny_chat.save(folder.parent / "whole"))
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("length", [0, 5, 200, -1])
@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_a_file_that_was_cut_off_is_named(
    folder: Path, tmp_path: Path, length: int, options: tuple[str, ...]
) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    data = ("--data", "builtin:safety", "--limit", 2)
    line = fails("attribute", folder, *data, *options, "--out", tmp_path / "out")
    assert "model.safetensors" in line


def test_a_sharded_checkpoint_names_the_damaged_part(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-3])
    with pytest.raises(ModelError, match=last.name):
        load_model(str(folder), device="cpu")


def test_names_are_data_not_markup(tmp_path: Path) -> None:
    """A name that looks like rich's markup, or that a terminal would obey, is shown as it is."""
    model = tmp_path / "[bold]" / "a[/x]b\x1b[2J"
    model.parent.mkdir(parents=True)
    tiny_chat.save(model)
    out = tmp_path / "o[/z]"
    shown = ""
    for name in ("safety", "utility"):
        data = ("--data", f"builtin:{name}", "--limit", 3)
        shown = call("attribute", model, *data, "--out", out / name).output
    groups = call("classify", out / "safety", out / "utility", *SHARES, "--out", out / "groups")
    for text in (shown, groups.output):
        joined = "".join(text.split())
        assert "o[/z]" in joined
        assert "\x1b[2J" not in text
    assert "a[/x]b\ufffd[2J" in "".join(groups.output.split())


@pytest.mark.parametrize(
    "encoding", [pytest.param("cp1252", marks=pytest.mark.exhaustive), "ascii"]
)
def test_output_of_a_narrow_encoding(tmp_path: Path, encoding: str) -> None:
    """What the encoding lacks is replaced; the work was done and the exit code says so."""
    for name in ("safety", "utility"):
        scores = {"layers.0.mlp": torch.rand(40, dtype=torch.float64)}
        told = {"metric": "variance", "tokens": "labels", "model_name": "m", "units_hash": "u"}
        counts = dict.fromkeys(scores, 2)
        moments = [{key: x + i for key, x in scores.items()} for i in (1, 2)]
        result = Attribution(scores, *moments, counts, **told, data_fingerprint=name)
        result.save(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("safety", "utility")]
    command = [sys.executable, "-m", "ssah.cli", "classify", *folders]
    result = subprocess.run(
        [*command, *SHARES, "--out", str(tmp_path / "groups")],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"?" in result.stdout
    assert (tmp_path / "groups" / "meta.json").is_file()


def test_a_full_output_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "ssah.cli", "info", "--json"],
            cwd=Path(__file__).parents[2],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "No space left" in result.stderr


def test_a_fault_of_the_library_is_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssah.info.describe", lambda: {}["gone"])
    line = fails("info", code=1)
    assert "KeyError: 'gone' (a fault of ssah: SSAH_TRACEBACK=1 shows where" in line


def _with_header(file: Path, header: dict[str, object], n_bytes: int) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(n_bytes))


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"x": {"dtype": "F32", "shape": [2.5], "data_offsets": [0, 8]}},
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"x": []},
    ],
)
def test_a_header_that_breaks_the_rules_names_the_file(
    tmp_path: Path, header: dict[str, object]
) -> None:
    file = tmp_path / "model.safetensors"
    _with_header(file, header, 12)
    with pytest.raises(ValueError, match=r"model\.safetensors' is not safetensors"):
        Checkpoint([file])


@pytest.mark.parametrize("weight_map", [["a"], {"x": "../other.safetensors"}, {"x": 3}, None])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, weight_map: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json"):
        Checkpoint.in_folder(tmp_path)
