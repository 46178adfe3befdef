"""The folder of a fine-tuning run: whose its checkpoints are, and what is damaged in it."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from commands import call, fails
from plans import assert_equal, snapshot
from tiny_chat import word_tokenizer
from transformers import AutoModelForCausalLM, Trainer
from typer.testing import CliRunner

from ssah.cli import app
from ssah.training import load_update
from ssah.training.finetune.checkpoints import SEAL

pytestmark = pytest.mark.xdist_group("run folders")  # its fixtures are made once

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{2 * i} w5"} for i in range(8)]
STEPS = 6


class Interrupted(BaseException):
    """Stands for the machine that goes down: no command may catch it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``rows.jsonl``, and ``cut``: a run that died after four updates."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_models.build("llama").save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    interrupt(folder, folder / "cut", after=5)
    call(*command(folder, folder / "whole"))
    return folder


def command(place: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("--data", place / "rows.jsonl", "--freeze", "none", "--device", "cpu")
    pace = ("--lr", 0.01, "--max-steps", STEPS, "--batch-size", 2, "--save-steps", 2)
    return ("finetune", place / "base", *data, *pace, "--out", out, *more)


def interrupt(place: Path, out: Path, *more: object, after: int) -> None:
    """A run that dies in the training step number ``after``."""
    calls, steps = [0], Trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == after:
            raise Interrupted
        return steps(*args, **kwargs)

    arguments = [str(each) for each in command(place, out, *more)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(Interrupted):
            CliRunner().invoke(app, arguments, catch_exceptions=False)


def weights(place: Path, out: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    load_update(model, out)
    return snapshot(model)


@pytest.fixture
def cut(place: Path, tmp_path: Path) -> Path:
    """A copy of the run that died: it has the checkpoints of step 2 and step 4."""
    shutil.copytree(place / "cut", tmp_path / "run")
    return tmp_path / "run"


# ------------------------------------------------------------------------------ another run's


def test_nothing_is_resumed_from_the_checkpoint_of_another_run(place: Path, tmp_path: Path) -> None:
    """A begins, B begins in the same folder and dies, A writes a checkpoint, B is called again."""
    out = tmp_path / "run"
    interrupt(place, tmp_path / "first", "--lr", 0.02, after=4)
    interrupt(place, out, "--lr", 0.01, after=1)  # B: no checkpoint yet, but its run.json
    shutil.copytree(tmp_path / "first/checkpoints", out / "checkpoints", dirs_exist_ok=True)
    line = fails(*command(place, out, "--lr", 0.01))
    assert f"{out}/checkpoints/checkpoint-2' is of a run that differs: lr was 0.02, is 0.01" in line


def test_a_run_goes_on_from_its_own_checkpoint(place: Path, cut: Path) -> None:
    found = json.loads(call(*command(place, cut, "--json")).stdout)
    assert found["resumed_from"] == 4
    assert_equal(weights(place, cut), weights(place, place / "whole"))


# ------------------------------------------------------------------------------ damaged parts

PARTS = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
    "training_args.bin",
    SEAL,
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, flip, Path.unlink)


def damaged_parts() -> Iterator[Any]:
    """One damage to each part; the rest is exhaustive."""
    for number, part in enumerate(PARTS):
        for damage in DAMAGES:
            chosen = damage is DAMAGES[number % len(DAMAGES)]
            marks = [] if chosen else [pytest.mark.exhaustive]
            yield pytest.param(part, damage, marks=marks, id=f"{part}-{damage.__name__}")


@pytest.mark.parametrize(("part", "damage"), damaged_parts())
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    part: str, damage: Callable[[Path], None], place: Path, cut: Path
) -> None:
    damage(cut / "checkpoints/checkpoint-4" / part)
    result = call(*command(place, cut, "--json"))
    assert json.loads(result.stdout)["resumed_from"] == 2
    said = [line for line in result.stderr.splitlines() if "checkpoint-4" in line]
    assert len(said) == 1
    assert part in said[0]
    assert_equal(weights(place, cut), weights(place, place / "whole"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_without_any_sound_checkpoint_is_refused(
    damage: Callable[[Path], None], place: Path, cut: Path
) -> None:
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        damage(cut / "checkpoints" / checkpoint / "optimizer.pt")
    line = fails(*command(place, cut))
    assert "optimizer.pt" in line
    assert f"no earlier checkpoint is whole: remove '{cut}/checkpoints'" in line
    assert (cut / "checkpoints/checkpoint-2").is_dir()  # nothing was removed


def test_a_checkpoint_that_was_not_written_to_its_end_does_not_push_out_a_sound_one(
    place: Path, cut: Path
) -> None:
    torn = cut / "checkpoints/checkpoint-5"
    shutil.copytree(cut / "checkpoints/checkpoint-4", torn)
    (torn / SEAL).unlink()
    interrupt(place, cut, after=1)
    assert not torn.exists()
    assert (cut / "checkpoints/checkpoint-4").is_dir()


# --------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize(
    "limit",
    [3_000, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in (100_000, 250_000))],
)
def test_a_full_disk_at_a_checkpoint_is_one_line(limit: int, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = fails(*command(place, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the checkpoint of step 2 cannot be written" in line
    assert f"{out}/checkpoints/checkpoint-2/" in line
    assert "bytes are free there" in line
    call(*command(place, out))
    assert_equal(weights(place, out), weights(place, place / "whole"))


# --------------------------------------------------------------------------------- the record


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"version": "0.1', "Unterminated string"),
        ("", "Expecting value"),
        ("{}", "the field 'version' is missing"),
        ("[]", "it holds a list, not an object"),
        ('{"version": "0.1.0"}', "the field 'identity' is missing"),
        ('{"version": "0.1.0", "identity": "x"}', "the field 'identity' is a string, must be"),
        ('{"version": 1, "identity": {}}', "the field 'version' is 1, must be a string"),
        ('{"version": "0", "identity": {}, "result": {}}', "the field 'steps' is missing"),
        ('{"version": "0", "identity": {}, "result": 3}', "it holds 3, not an object"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_run_json_is_named(content: str, named: str, place: Path, cut: Path) -> None:
    (cut / "run.json").write_text(content)
    line = fails(*command(place, cut))
    assert f"file '{cut}/run.json' is damaged: " in line
    assert named in line
