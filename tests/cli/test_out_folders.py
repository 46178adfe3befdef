"""No command writes its result into the folder of a model that it reads, whatever it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from commands import commands, fails
from typer.testing import CliRunner

from ssah.cli import app

# MODEL stands for the model whose folder the result would go to; another one stands beside it.
SETS = ("--safety", "s", "--utility", "u", "--requests", "r", "--utility-eval", "e")
WITH_SETS = {"stability": SETS[:4], "scan": SETS, "study": SETS}
LINES = (
    "align MODEL --data d",
    "attribute MODEL --data d",
    "attribute other --base MODEL --data d",
    "check MODEL other",
    "check other MODEL",
    "compare MODEL --data d",
    "compare other --unaligned MODEL --data d",
    "delta MODEL other --interpolate 0.5",
    "delta other another MODEL --merge mean",
    "diagnose MODEL --unaligned other",
    "diagnose other --unaligned MODEL",
    "evaluate MODEL",
    "evaluate other --intact MODEL",
    "export MODEL --change other",
    "export other --change MODEL",
    "finetune MODEL --data d --freeze none",
    "probe MODEL",
    "probe other --beside MODEL",
    "protect MODEL --data d",
    "protect other --unaligned MODEL --data d",
    "scan MODEL",
    "stability MODEL",
    "study budget MODEL",
    "study freeze MODEL --finetune d",
    "weights MODEL --metric magnitude",
)
WITHOUT_MODEL = {"bench", "classify", "demo", "transfer"}


def words(line: str, model: Path) -> list[str]:
    name, *rest = line.replace("MODEL", str(model)).split()
    return [name, *rest, *WITH_SETS.get(name, ())]


@pytest.mark.parametrize("line", LINES)
def test_a_result_in_the_folder_of_a_model_is_refused_at_once(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    said = fails(*words(line, model), "--out", "link/deep/result")
    assert "out is 'link/deep/result', which lies in the folder of the model" in said
    assert repr(str(model)) in said
    assert "which is the folder of the model" in fails(*words(line, model), "--out", model)
    assert [each.name for each in model.iterdir()] == ["config.json"]


def test_every_command_that_writes_a_folder_is_here() -> None:
    group = typer.main.get_command(app)
    writing = {
        " ".join(path)
        for path, command in commands(group)
        for option in command.params
        if "--out" in option.opts and option.metavar == "DIR"
    }
    named = {" ".join(line.split(" MODEL")[0].split(" other")[0].split()) for line in LINES}
    assert named | WITHOUT_MODEL == writing


@pytest.mark.parametrize("file", ["adapter_config.json", "model.gguf", "meta.json"])
def test_adapters_packed_models_and_updates_count(file: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / file).write_text(json.dumps({"content": "update"}))
    said = fails("evaluate", model, "--out", model / "result")
    assert "lies in the folder of the model" in said
    # Scores and groups are no model, and a file of a model says nothing of its folder.
    if file != "adapter_config.json":
        (model / file).write_text(json.dumps({"content": "groups"}))
        given = model / file if file == "model.gguf" else model
        beside = fails("evaluate", given, "--out", model / "result", "--requests", "none.jsonl")
        assert "none.jsonl" in beside


@pytest.mark.parametrize("line", ["attribute m --out=", "report . -o ", "classify a b --out "])
def test_an_empty_text_is_not_the_current_folder(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, line.split(" "))
    assert result.exit_code == 2
    assert "is empty, must be a path" in result.stderr
    assert not any(tmp_path.iterdir())
