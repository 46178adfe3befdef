"""``ssah finetune --requests``: what a model refuses before and after, kept and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from commands import as_json, call, fails
from transformers import Trainer

from ssah.data import load_requests
from ssah.evaluation import Refusals, answers
from ssah.training import freeze, load_trained
from ssah.training.finetune import Settings, fine_tune

pytestmark = pytest.mark.xdist_group("finetune safety")  # its fixtures are made once

ASKED = ("--requests", "builtin:safety_eval[0:5]", "--over-refusal", "builtin:overrefusal[0:4]")
JUDGED = ("--judge", "python:even.judge", "--max-new-tokens", 8)
JUDGE = "def judge(request: str, answer: str) -> bool:\n    return len(answer) % 2 == 0\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, and ``run``, a finished run that was asked."""
    folder = tmp_path_factory.mktemp("safety")
    tiny_chat.save(folder / "base")
    (folder / "even.py").write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the judge is
        as_json(*command(folder, folder / "run"), *ASKED, *JUDGED)
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run."""
    monkeypatch.chdir(place)
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path


def command(place: Path, out: Path) -> tuple[object, ...]:
    data = ("--data", "builtin:utility_eval[0:8]", "--batch-size", 2, "--max-steps", 4)
    given = ("--freeze", "none", *data, "--lr", 0.01, "--save-steps", 2, "--device", "cpu")
    return ("finetune", place / "base", *given, "--out", out)


def direct(name: str) -> dict[str, Any]:
    """What the same requests find of a model that is loaded for it."""
    harmful = load_requests("builtin:safety_eval[0:5]")
    harmless = load_requests("builtin:overrefusal[0:4]")
    given = {"over_refusal": harmless, "judge": "python:even.judge", "max_new_tokens": 8}
    return Refusals(*load_trained(name), harmful, **given)()


def test_before_and_after_are_those_of_both_models(place: Path, here: Path) -> None:
    result = call(*command(place, here / "run"), *ASKED, *JUDGED)
    assert "Finished earlier; not trained again" in result.stdout
    assert "harmful requests refused (python:even.judge)" in result.stdout
    assert "before training: refused" in result.stderr
    assert "after training: refused" in result.stderr
    found = as_json(*command(place, here / "run"), *ASKED, *JUDGED)["safety"]
    assert found["asked"]["judge"]["name"] == "python:even.judge"
    for when, name in (("before", place / "base"), ("after", here / "run")):
        own, expected = found[when], direct(str(name))
        margins = expected["per_request"].pop("margins")
        assert own["per_request"].pop("margins") == pytest.approx(margins, abs=1e-4)
        assert own.pop("refusal_margin") == pytest.approx(expected.pop("refusal_margin"), abs=1e-4)
        assert own == expected
    before, after = (found[when]["refused"]["rate"] for when in ("before", "after"))
    assert found["change"]["refused"]["change"] == pytest.approx(after - before)


def test_no_answer_is_kept(place: Path, here: Path) -> None:
    requests = load_requests("builtin:safety_eval[0:5]")
    files = [path.read_text() for path in (here / "run").glob("*.json")]
    for name in (place / "base", here / "run"):
        for each in answers(*load_trained(str(name)), requests, max_new_tokens=8):
            assert each.strip()
            assert not any(json.dumps(each)[1:-1] in text for text in files)


def test_nothing_is_measured_twice(
    place: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    measure = Refusals.__call__

    def counted(self: Refusals) -> dict[str, Any]:
        asked.append(len(self.requests))
        return measure(self)

    monkeypatch.setattr(Refusals, "__call__", counted)
    again = (*command(place, here / "run"), *JUDGED)
    as_json(*again, *ASKED)
    assert asked == []
    # Something else is asked: of the finished run too, whose weights stay what they are.
    other = as_json(*again, "--requests", "builtin:safety_eval[5:8]", "--over-refusal", "none")
    assert asked == [3, 3]
    assert other["already_finished"] is True
    assert other["safety"]["before"]["over_refused"] is None
    assert as_json(*command(place, here / "run"))["safety"] is None


def test_a_run_that_goes_on_keeps_what_was_before(
    place: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = here / "cut", Trainer.training_step
    calls: list[int] = []

    def fail_in_the_fourth_step(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 4:
            raise RuntimeError("the machine goes down")
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", fail_in_the_fourth_step)
        call(*command(place, out), *ASKED, *JUDGED, code=1)
    kept = json.loads((out / "run.json").read_text())["safety"]
    assert set(kept) == {"asked", "before"}
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, *_, **__: logged.append(logs))
    found = as_json(*command(place, out), *ASKED, *JUDGED)
    assert found["resumed_from"] == 2
    rates = [each["safety_refused"] for each in logged if "safety_refused" in each]
    assert rates == [found["safety"][when]["refused"]["rate"] for when in ("before", "after")]
    whole = json.loads((here / "run/run.json").read_text())["safety"]
    assert {key: found["safety"][key] for key in whole} == whole


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--requests", "nowhere.txt"), "nowhere.txt"),
        (("--requests", "builtin:safety_eval", "--judge", "nobody"), "judge is 'nobody'"),
        (("--requests", "builtin:safety_eval", "--over-refusal", "no.txt"), "no.txt"),
        (("--requests", "builtin:safety_eval", "--max-new-tokens", 2), "max_new_tokens is 2"),
        (("--requests", "LONG"), "positions of the model"),
        (("--judge", "zou2023"), "judge is 'zou2023' without requests"),
    ],
)
def test_wrong_requests_are_refused_before_training(
    options: tuple[object, ...], named: str, place: Path, here: Path
) -> None:
    (here / "long.txt").write_text("why " * 3000)
    given = [here / "long.txt" if option == "LONG" else option for option in options]
    assert named in fails(*command(place, here / "new"), *given)
    assert not (here / "new").exists()


def test_another_model_is_not_measured(place: Path, here: Path) -> None:
    (model, tokenizer), (other, _) = (load_trained(str(place / "base")) for _ in range(2))
    examples: Any = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}]
    plan = freeze(model, keep=["*norm*"])
    asked = Refusals(other, tokenizer, ["Why?"], judge="zou2023")
    with pytest.raises(ValueError, match="another model than the plan's"):
        fine_tune(plan, examples, here / "new", Settings(), tokenizer=tokenizer, safety=asked)
    assert not (here / "new").exists()


def test_a_damaged_record_is_named(place: Path, here: Path) -> None:
    path = here / "run/run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "safety": {"asked": 3}}))
    assert "run.json" in fails(*command(place, here / "run"), *ASKED, *JUDGED)
