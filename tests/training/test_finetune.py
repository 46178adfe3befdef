"""``ssah finetune`` and ``ssah align`` on a tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from click.testing import Result
from plans import assert_equal, snapshot
from tiny_chat import word_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from typer.testing import CliRunner

from ssah.cli import app
from ssah.groups import UnitGroups, classify
from ssah.training import freeze, load_update, train_only
from ssah.training.finetune import Settings, check_folder, fine_tune, select_units
from ssah.units import UnitSet, find_modules

pytestmark = pytest.mark.xdist_group("finetune")  # its fixtures are made once

ROWS = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": f"w{2 * i} w5 w7"} for i in range(8)]
QUICK = ("--lr", "0.01", "--max-steps", "4", "--batch-size", "2", "--save-steps", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``groups``, ``other_groups`` and ``rows.jsonl``."""
    folder = tmp_path_factory.mktemp("finetune")
    model = tiny_models.build("llama")
    model.config.attention_dropout = 0.1  # so that resuming must restore the generator
    model.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    for name in ("groups", "other_groups"):
        safety, utility = (
            {n: torch.rand(m.n_units, generator=generator) for n, m in find_modules(model).items()}
            for _ in range(2)
        )
        classify(safety, utility, scu=0.1, ucu=0.1, ru=0.3).save(folder / name)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def base(place: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place / "base")


def call(command: str, place: Path, *options: object, device: str = "cpu") -> Result:
    given = [str(option) for option in options]
    defaults = {"--data": place / "rows.jsonl", "--groups": place / "groups", "--device": device}
    for name, value in defaults.items():
        if name not in given and not (name == "--groups" and "none" in given):
            given += [name, str(value)]
    model = [] if given and not given[0].startswith("-") else [str(place / "base")]
    return CliRunner().invoke(app, [command, *model, *given], catch_exceptions=False)


def answer(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # fails if anything but JSON is there


def error(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def updated(place: Path, out: Path) -> dict[str, Tensor]:
    model = base(place)
    load_update(model, out)
    return snapshot(model)


def owned(model: PreTrainedModel, units: UnitSet) -> dict[str, Tensor]:
    """The columns of every B that belong to the units."""
    weights = dict(model.named_parameters())
    return {name: weights[f"{name}.weight"].detach()[:, index] for name, index in units.items()}


# ------------------------------------------------------------------------------------ training


def test_finetune_freezes_units_and_saves_update_and_model(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--freeze", "scu", "--freeze", "cu:0.06", "--out", out, *QUICK)
    found = answer(
        call("finetune", place, *options, "--merge", "--json", "--eval-data", place / "rows.jsonl")
    )
    assert found["steps"] == 4
    assert found["resumed_from"] == 0
    assert found["eval_loss"] < found["eval_loss_before"]
    assert found["frozen_verified"] is True
    assert found["parameters"]["trained"] < found["parameters"]["all"]

    start, model = base(place), AutoModelForCausalLM.from_pretrained(out / "merged")
    groups = UnitGroups.load(place / "groups", start)
    frozen = groups["scu"] | groups.top("cu", 0.06)
    assert found["units"] == len(frozen)
    assert_equal(owned(start, frozen), owned(model, frozen))
    free = owned(start, frozen.complement()), owned(model, frozen.complement())
    assert all(not torch.equal(free[0][name], free[1][name]) for name in frozen)
    assert_equal(updated(place, out), snapshot(model))
    assert not (out / "checkpoints").exists()

    again = answer(call("finetune", place, *options, "--json"))
    assert again["already_finished"] is True
    assert again["loss_last"] == found["loss_last"]


def test_align_trains_redundant_units_alone(place: Path, tmp_path: Path) -> None:
    result = call(
        "align",
        place,
        "--out",
        tmp_path / "run",
        *QUICK,
        "--keep-checkpoints",
        "--gradient-checkpointing",
    )
    assert result.exit_code == 0, result.output
    assert "verified" in result.stdout
    assert "step      4" in result.stderr
    assert (tmp_path / "run/checkpoints/checkpoint-4").is_dir()
    start, after = base(place), updated(place, tmp_path / "run")
    redundant = UnitGroups.load(place / "groups")["ru"]
    for name, before in snapshot(start).items():
        columns = redundant[name.removesuffix(".weight")] if "down_proj" in name else None
        if columns is not None:
            moved = (after[name] != before).any(0)
            assert moved.nonzero()[:, 0].tolist() == columns.tolist()
        elif not any(part in name for part in ("gate_proj", "up_proj", "v_proj", "o_proj")):
            assert torch.equal(after[name], before), name


def test_none_trains_everything(place: Path, tmp_path: Path) -> None:
    found = answer(
        call("finetune", place, "--freeze", "none", "--out", tmp_path / "run", *QUICK, "--json")
    )
    assert found["parameters"]["share"] == 1
    before, after = snapshot(base(place)), updated(place, tmp_path / "run")
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_bfloat16_weights_move_by_unbiased_rounding(place: Path, tmp_path: Path) -> None:
    seen = []
    for run in ("one", "two"):
        options = ("--freeze", "scu", "--out", tmp_path / run, *QUICK, "--dtype", "bfloat16")
        answer(call("finetune", place, *options, "--lr", "1e-5", "--bf16", "--json"))
        model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.bfloat16)
        before = snapshot(model)
        load_update(model, tmp_path / run)
        seen.append(snapshot(model))
    assert_equal(*seen)
    # Rounded to the nearest, no weight of this size would notice steps of 1e-5.
    name = "model.embed_tokens.weight"
    assert (seen[0][name] != before[name])[before[name].abs() > 0.1].any()


# ---------------------------------------------------------------------- rows and whole parameters

EMBEDDING = "model.embed_tokens.weight"


def moved_rows(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(1).nonzero()[:, 0].tolist()


def test_rows_and_names_stay_beside_units(place: Path, tmp_path: Path) -> None:
    write = tmp_path / "rows.txt"
    write.write_text(f"{EMBEDDING}:7\n\nlm_head.weight:0-3, 9\n")
    options = ("--freeze", "scu", "--keep", "*norm*", "--rows", f"{EMBEDDING}:3-5,11")
    run = (*options, "--rows", write, "--out", tmp_path / "run", *QUICK, "--weight-decay", "0.1")
    found = answer(call("finetune", place, *run, "--json"))
    assert found["keep"] == ["*norm*"]
    assert found["parameter_rows"] == {
        EMBEDDING: [3, 4, 5, 7, 11],
        "lm_head.weight": [0, 1, 2, 3, 9],
    }
    start, after = snapshot(base(place)), updated(place, tmp_path / "run")
    for name, frozen in found["parameter_rows"].items():
        free = start[name].any(1)  # the row of padding is zero: no decay moves it
        free[frozen] = False
        assert moved_rows(start[name], after[name]) == free.nonzero()[:, 0].tolist(), name
    norms = [name for name in start if "norm" in name]
    assert norms
    assert all(torch.equal(start[name], after[name]) for name in norms)

    message = error(call("finetune", place, *run, "--rows", "lm_head.weight:20"))
    assert "trained units (groups and selection) was" in message


def test_rows_alone_train_without_groups(place: Path, tmp_path: Path) -> None:
    options = ("--train", "none", "--rows", f"{EMBEDDING}:5,7", "--out", tmp_path / "run")
    model = base(place)
    data = ("--data", place / "rows.jsonl", *QUICK, "--json")
    given = ["align", place / "base", *options, *data]
    found = answer(CliRunner().invoke(app, [str(each) for each in given], catch_exceptions=False))
    assert found["parameters"]["trained"] == 2 * model.config.hidden_size
    assert found["units"] == 0
    start, after = snapshot(model), updated(place, tmp_path / "run")
    assert moved_rows(start[EMBEDDING], after[EMBEDDING]) == [5, 7]
    assert all(torch.equal(start[name], after[name]) for name in start if name != EMBEDDING)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rows", "lm_head.weight"), "rows is 'lm_head.weight'; it must be the name of a"),
        (("--rows", "lm_head.weight:5-3"), "rows of lm_head.weight has '5-3'; the first"),
        (("--rows", "lm_head.weight:0-99999999999"), "the last below 10,000,000"),
        (("--rows", "lm_head.weight:1,,2"), "it must be the name of a parameter and its rows"),
        (("--rows", "FILE"), "rows.txt:2 is 'lm_head.weight:x'; it must be"),
        (("--rows", "EMPTY"), "which is empty"),
        (("--rows", "head.weight:1"), "rows has names that the model lacks: head.weight"),
        (("--rows", "lm_head.weight:100000"), "rows has 100000 for 'lm_head.weight'"),
        (("--keep", "nothing.*"), "keep has names that the model lacks: nothing.*"),
    ],
)
def test_wrong_rows_and_names_are_named(
    options: tuple[str, str], named: str, place: Path, tmp_path: Path
) -> None:
    files = {"FILE": tmp_path / "rows.txt", "EMPTY": tmp_path / "empty.txt"}
    files["FILE"].write_text("lm_head.weight:1\nlm_head.weight:x\n")
    files["EMPTY"].write_text("\n")
    given = [files.get(option, option) for option in options]
    message = error(
        call("finetune", place, "--freeze", "scu", *given, "--out", tmp_path / "run", *QUICK)
    )
    assert named in message
    assert not (tmp_path / "run").exists()


def test_no_units_and_no_rows_are_nothing_to_train(place: Path, tmp_path: Path) -> None:
    given = ["align", place / "base", "--data", place / "rows.jsonl", "--out", tmp_path / "run"]
    words = [str(each) for each in given]
    message = error(CliRunner().invoke(app, [*words, "--train", "none"]))
    assert "nothing would train; give --rows, or units" in message
    assert "give --groups DIR, or --train none" in error(CliRunner().invoke(app, words))


# ------------------------------------------------------------------------------------ resuming


class Interrupted(BaseException):
    """Stands for the machine that goes down: no command may catch it."""


@pytest.mark.parametrize(
    ("command", "selection"),
    [
        ("finetune", ("--freeze", "scu")),
        pytest.param("align", ("--train", "ru"), marks=pytest.mark.exhaustive),
    ],
)
def test_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(
    command: str,
    selection: tuple[str, str],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = (*selection, *QUICK, "--json", "--weight-decay", "0.1", "--logging-steps", "1")
    if command == "finetune":
        options = (*options, "--eval-data", place / "rows.jsonl", "--gradient-accumulation", "2")
    else:
        options = (*options, "--state-dtype", "8bit")
    whole = answer(call(command, place, *options, "--out", tmp_path / "whole"))
    identity = json.loads((tmp_path / "whole/run.json").read_text())["identity"]
    # A run of an earlier release, which had float32 alone, says nothing of it.
    assert identity.get("state_dtype") == (None if command == "finetune" else "8bit")

    steps = Trainer.training_step
    calls = [0]

    def fail_in_the_fourth_step(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == (7 if command == "finetune" else 4):
            raise Interrupted
        return steps(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", fail_in_the_fourth_step)
        with pytest.raises(Interrupted):
            call(command, place, *options, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut/meta.json").exists()
    torn = tmp_path / "cut/checkpoints/checkpoint-3"  # one whose writing was interrupted
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"")

    resumed = answer(call(command, place, *options, "--out", tmp_path / "cut"))
    assert resumed["resumed_from"] == 2
    for name in ("steps", "loss_first", "loss_last", "eval_loss_before", "eval_loss"):
        assert resumed[name] == whole[name], name
    assert_equal(updated(place, tmp_path / "cut"), updated(place, tmp_path / "whole"))


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with its checkpoints."""
    out = tmp_path_factory.mktemp("done") / "run"
    options = ("--freeze", "scu", "--out", out, *QUICK, "--keep-checkpoints", "--json")
    answer(call("finetune", place, *options))
    return out


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--lr", "0.02"), "lr was 0.01, is 0.02"),
        (("--seed", "1"), "seed was 0, is 1"),
        (("--freeze", "ucu"), "trained units (groups and selection) was"),
        (("--groups", "OTHER"), "trained units (groups and selection) was"),
        (("--limit", "6"), "data was"),
        (("--max-length", "5"), "data was"),
    ],
)
def test_another_run_is_refused_by_what_differs(
    changed: tuple[str, str], named: str, place: Path, done: Path
) -> None:
    options: list[object] = ["--freeze", "scu", "--out", done, *QUICK]
    options += [place / "other_groups" if value == "OTHER" else value for value in changed]
    message = error(call("finetune", place, *options))
    assert named in message
    if "units" in named:
        assert "model weights" not in message


def test_other_base_weights_are_refused(place: Path, done: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llama", seed=1)
    model.config.attention_dropout = 0.1
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    options = ("--freeze", "scu", "--out", done, *QUICK)
    message = error(call("finetune", place, tmp_path / "base", *options))
    assert "model weights was" in message
    assert "lr" not in message


def test_unfinished_run_is_refused_once_it_has_a_checkpoint(
    place: Path, done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(done, out)
    record = json.loads((out / "run.json").read_text())
    del record["result"]
    (out / "run.json").write_text(json.dumps(record))
    options = ("--freeze", "scu", "--out", out, *QUICK, "--epochs", "2", "--json")
    assert "epochs was 1.0, is 2.0" in error(call("finetune", place, *options[:-1]))
    shutil.rmtree(out / "checkpoints")
    assert answer(call("finetune", place, *options))["resumed_from"] == 0


def test_finished_run_can_still_be_merged(place: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(done, out)
    options = ("--freeze", "scu", "--out", out, *QUICK, "--merge", "--json")
    found = answer(call("finetune", place, *options))
    assert found["already_finished"] is True
    merged = AutoModelForCausalLM.from_pretrained(found["merged"])
    assert_equal(snapshot(merged), updated(place, done))


# ------------------------------------------------------------------------------------- dry run


def test_dry_run_shows_what_it_takes_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = answer(call("align", place, "--out", out, "--dry-run", "--json", "--batch-size", "2"))
    plan = train_only(base(place), UnitGroups.load(place / "groups")["ru"])
    trained = sum(p.numel() for p in plan.parameters())
    memory = found["memory"]
    assert found["dry_run"] is True
    assert found["parameters"]["trained"] == trained
    assert found["parameters"]["share"] == trained / plan.n_parameters
    assert memory["gradients"] == 4 * trained
    assert memory["optimizer_state"] == 8 * trained
    assert memory["peak"] == sum(value for name, value in memory.items() if name != "peak")
    assert not out.exists()
    shown = call("align", place, "--dry-run")
    assert "estimated peak" in shown.stdout
    assert f"{trained:,} of {plan.n_parameters:,}" in shown.stdout


# --------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--freeze", "scu"), "out is missing"),
        (("--freeze", "sc", "--out", "OUT"), "'sc'; it must be one of scu, ucu, ru, cu"),
        (("--freeze", "cu:x", "--out", "OUT"), "'cu:x': 'x' must be a fraction of all units"),
        (("--freeze", "scu:0.5", "--out", "OUT"), "fraction is 0.5; the group scu is 0.1"),
        (("--freeze", "cu:0", "--out", "OUT"), "has no units"),
        (("--freeze", "none", "--freeze", "scu", "--out", "OUT"), "must stand alone"),
        (("--freeze", "scu", "--out", "OUT", "--groups", "nowhere"), "there is no folder"),
        (("--freeze", "scu", "--out", "OUT", "--data", "nowhere.jsonl"), "existing file"),
        (("--freeze", "scu", "--out", "OUT", "--data", "BAD"), "bad.jsonl:1: no response"),
        (("--freeze", "scu", "--out", "OUT", "--max-length", "3"), "leaves no room"),
        (("--freeze", "scu", "--out", "FULL"), "holds something else than a run"),
        (("--freeze", "scu", "--out", "FILE"), "it must be a folder"),
        (("--freeze", "scu", "--out", "OUT", "--lr", "0"), "lr is 0.0; it must be greater than 0"),
        (("--freeze", "scu", "--out", "OUT", "--epochs", "nan"), "epochs is nan"),
        (("--freeze", "scu", "--out", "OUT", "--warmup-ratio", "1.5"), "warmup_ratio is 1.5"),
        (("--freeze", "scu", "--out", "OUT", "--report-to", "paper"), "report_to is 'paper'"),
        (("--freeze", "scu", "--out", "OUT", "--dtype", "float16"), "dtype is float16"),
    ],
)
def test_wrong_input_is_one_line(
    options: tuple[str, ...], named: str, place: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "w3"}])
    (tmp_path / "file").write_text("")
    names = {
        "OUT": tmp_path / "run",
        "BAD": tmp_path / "bad.jsonl",
        "FULL": place / "groups",
        "FILE": tmp_path / "file",
    }
    assert named in error(call("finetune", place, *(names.get(o, o) for o in options)))
    assert not (tmp_path / "run/checkpoints").exists()


def test_groups_must_be_given_and_of_this_model(place: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "run"))
    data = ("--data", str(place / "rows.jsonl"))
    bare = CliRunner().invoke(
        app, ["finetune", str(place / "base"), *data, "--freeze", "scu", *out]
    )
    assert "groups is missing" in error(bare)
    tiny_models.build("gpt2").save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert "model.layers.0" in error(call("align", place, tmp_path / "gpt2", *out))
    assert "nowhere/at/all" in error(call("align", place, "nowhere/at/all", *out))
    assert CliRunner().invoke(app, ["align", str(place / "base")]).exit_code == 2


def test_groups_folder_is_never_written_over(place: Path) -> None:
    with pytest.raises(ValueError, match="something else than a run"):
        check_folder(place / "groups")
    with pytest.raises(ValueError, match="no units"):
        select_units([], UnitGroups.load(place / "groups"))


def test_divergence_stops_the_run_and_saves_nothing(place: Path, tmp_path: Path) -> None:
    model = base(place)
    model.lm_head.weight.data.mul_(float("inf"))
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    options = ("--freeze", "scu", "--out", tmp_path / "run", *QUICK)
    result = call("finetune", place, tmp_path / "base", *options)
    assert result.exit_code == 1
    assert "the loss is nan at step 1: the run diverged" in result.stderr
    assert not (tmp_path / "run/meta.json").exists()


def test_a_moved_frozen_weight_is_an_error(place: Path, tmp_path: Path) -> None:
    plan = freeze(base(place), UnitGroups.load(place / "groups")["scu"])
    digest = next(iter(plan.digests))
    plan.digests[digest] = "0" * 64
    examples: Any = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}]
    with pytest.raises(RuntimeError, match="are not what they were"):
        fine_tune(plan, examples, tmp_path, Settings(max_steps=1), tokenizer=word_tokenizer())
    assert not (tmp_path / "meta.json").exists()
