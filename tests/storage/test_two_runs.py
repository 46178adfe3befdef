"""Two commands in one folder: one works there, the other is refused at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from commands import call, fails, prepare
from streamed import assert_same
from tiny_models import build, collate, rows
from typer.testing import CliRunner

from ssah.attribution import Attribution, attribute
from ssah.attribution import run as attribution
from ssah.cli import app
from ssah.storage import LOCK, check_free, one_run
from ssah.studies.run_folder import Run

pytestmark = pytest.mark.xdist_group("two runs")  # its fixtures are made once


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("runs"), 12)


SMALL = ("--limit", 4)
# What works in a folder for a while: every command that has something to go on with.
COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "attribute": lambda runs: ("attribute", runs / "model", "--data", "builtin:safety", *SMALL),
    "attribute --stream": lambda runs: (
        "attribute", runs / "model", "--data", "builtin:safety", *SMALL, "--stream"
    ),
    "finetune": lambda runs: (
        "finetune", runs / "model", "--data", "builtin:utility", *SMALL, "--freeze", "none",
        "--max-steps", 1, "--device", "cpu",
    ),
    "align": lambda runs: (
        "align", runs / "model", "--data", "builtin:safety", *SMALL, "--groups", runs / "groups",
        "--max-steps", 1, "--device", "cpu",
    ),
    "transfer": lambda runs: ("transfer", runs / "groups", runs / "groups"),
    "probe": lambda runs: ("probe", runs / "model"),
    "demo": lambda runs: ("demo", "--model", runs / "model", "--seconds", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_command_is_refused_by_the_process_that_works_there(
    name: str, runs: Path, tmp_path: Path
) -> None:
    with one_run(tmp_path / "out"):
        line = fails(*COMMANDS[name](runs), "--out", tmp_path / "out")
        who = f"process {os.getpid()} on {os.uname().nodename}"
        assert f"{who} is running in '{tmp_path / 'out'}'" in line
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


def test_a_process_that_died_does_not_block(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with one_run(out):
            os._exit(9)  # with the lock in its hands
    os.waitpid(child, 0)
    assert (out / LOCK).is_file()
    call(*COMMANDS["finetune"](runs), "--out", out)
    assert not (out / LOCK).exists()


def test_two_equal_commands_at_once(runs: Path, tmp_path: Path) -> None:
    """One finishes with the right bits, the other ends with exit code 2."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = ("attribute", runs / "model", "--data", "builtin:safety", "--limit", 24)
    call(*command, "--out", whole)
    children = []
    for name in "ab":
        child = os.fork()
        if child == 0:
            os._exit(_note(tmp_path / name, *command, "--out", out))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    ended = [((tmp_path / name).read_text(), code) for name, code in zip("ab", codes, strict=True)]
    codes.sort()
    # On a busy machine the second may begin when the first has ended: then it is just a second run.
    assert codes in ([0, 2], [0, 0]), ended
    for stderr, code in ended:
        assert "Traceback" not in stderr
        if code == 2:
            line = stderr.splitlines()[-1]
            assert line.startswith("error: process ")
            assert f"is running in '{out}'" in line
    assert_same(Attribution.load(out), Attribution.load(whole))
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}


def _note(file: Path, *words: object) -> int:
    """Run a command; its exit code, and in ``file`` what it wrote to standard error."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    file.write_text(result.stderr)
    return result.exit_code


def test_a_lock_is_one_for_all_who_ask_at_once(tmp_path: Path) -> None:
    """The lock appears and goes while others ask for it: nobody else is ever inside."""
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(_enter_often(tmp_path / "out", tmp_path / "inside"))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def _enter_often(folder: Path, inside: Path) -> int:
    for _ in range(300):
        try:
            with one_run(folder):
                inside.touch(exist_ok=False)  # fails if another process is in there
                inside.unlink()
        except ValueError:
            continue
        except OSError:
            return 1
    return 0


def test_a_state_is_of_one_call_at_a_time(tmp_path: Path) -> None:
    batches = [collate(rows((11, 4, 9)))]

    def during() -> Any:
        yield batches[0]
        with pytest.raises(ValueError, match=f"is running in '{tmp_path / 'state'}'"):
            attribute(build("llama"), batches, resume_dir=tmp_path / "state")

    result = attribute(build("llama"), during(), resume_dir=tmp_path / "state")
    again = attribute(build("llama"), batches, resume_dir=tmp_path / "state", save_every_seconds=0)
    assert_same(result, again)


def test_a_state_that_is_refused_is_not_kept_locked(tmp_path: Path) -> None:
    batches = [collate(rows((11, 4, 9)))]
    attribute(build("llama"), batches, resume_dir=tmp_path, save_every_seconds=0)
    with pytest.raises(ValueError, match="unfinished run with metric"):
        attribute(build("llama"), batches, resume_dir=tmp_path, metric="norm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribution, "check_finite", None)
        with pytest.raises(TypeError):
            attribute(build("llama"), batches, resume_dir=tmp_path)
    attribute(build("llama"), batches, resume_dir=tmp_path)


# --------------------------------------------------------------------------------- experiments


def run(out: Path) -> Run:
    return Run(out, "scan", {"seed": 7}, {})


def finished(out: Path) -> dict[str, Any]:
    with run(out).begin():
        pass
    opened = run(out)
    with opened.begin():
        opened.step("first", lambda: {"x": 1.5})
        return opened.finish({"answer": 42})


def test_a_finished_experiment_stays_finished_when_its_command_is_interrupted(
    tmp_path: Path,
) -> None:
    record = finished(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path)
    assert json.loads((tmp_path / "experiment.json").read_text()) == record


def interrupt(out: Path) -> None:
    with run(out).begin():
        raise KeyboardInterrupt


def test_an_experiment_that_another_process_began_meanwhile_is_refused(tmp_path: Path) -> None:
    late = run(tmp_path)
    with Run(tmp_path, "scan", {"seed": 8}, {}).begin():
        pass
    with pytest.raises(ValueError, match="with seed 8, not 7"):
        late.begin().__enter__()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"kind": "scan"', "Expecting ',' delimiter"),
        ("", "Expecting value"),
        ("{}", "the field 'kind' is missing"),
        ("[]", "it holds a list, not an object"),
        ('{"kind": 3}', "the field 'kind' is 3, must be a string"),
        ('{"kind": "scan", "settings": []}', "the field 'settings' is a list, must be an object"),
    ],
)
def test_a_damaged_experiment_json_is_named(content: str, named: str, tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(ValueError, match=r"experiment.json' is damaged: ") as raised:
        run(tmp_path)
    assert named in str(raised.value)


@pytest.mark.parametrize(
    "content", ['{"x"', "", "{}", "[]", "1.5", '{"step": "first", "result": 3}']
)
def test_a_damaged_step_is_named_and_can_be_done_again(content: str, tmp_path: Path) -> None:
    finished(tmp_path)
    step = tmp_path / "steps" / "first.json"
    step.write_text(content)
    opened = run(tmp_path)
    with opened.begin():
        with pytest.raises(ValueError, match="remove it, and the step is done again") as raised:
            opened.step("first", lambda: {"x": 1.5})
        assert f"file '{step}' is damaged" in str(raised.value)
        step.unlink()
        assert opened.step("first", lambda: {"x": 1.5}) == {"x": 1.5}


def test_what_a_command_needs_of_its_folder_is_found_before_a_model_is_loaded(
    runs: Path, tmp_path: Path
) -> None:
    tiny_chat.save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")  # loading it would say so
    model = ("attribute", tmp_path / "model", "--data", "builtin:safety", "--out")
    (tmp_path / "file").write_text("")
    assert f"'{tmp_path}/file'" in fails(*model, tmp_path / "file")
    assert "holds 'ssah unit groups', which" in fails(*model, runs / "groups")


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match=r"note', which is a file; it must be a folder"):
        check_free(tmp_path / "note")
    assert (tmp_path / "note").read_text() == "mine"
