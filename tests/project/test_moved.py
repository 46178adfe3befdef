"""Names of earlier releases work for one more, and say what they are now."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest
from tiny_models import build, collate, rows

import ssah
from ssah.distributed import Ranks, deal
from ssah.moved import MOVED, renamed


@renamed(group="process_group", state="resume_dir")
def score(model: str, *, process_group: str = "auto", resume_dir: str | None = None) -> str:
    """What it does."""
    return f"{model} {process_group} {resume_dir}"


class Plan:
    @renamed(also="extra_parameters")
    def __init__(self, extra_parameters: int) -> None:
        self.extra_parameters = extra_parameters


def test_an_old_parameter_is_taken_with_a_warning_at_the_callers_line() -> None:
    with pytest.warns(DeprecationWarning, match=r"score\(group=\) is now score\(process_g") as seen:
        assert score("llama", group="mine") == "llama mine None"  # type: ignore[call-arg]
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(DeprecationWarning, match=r"Plan\(also=\) is now Plan\(extra_parameters=\)"):
        assert Plan(also=3).extra_parameters == 3  # type: ignore[call-arg]


@pytest.mark.filterwarnings("error")
def test_a_new_parameter_is_taken_without_a_warning() -> None:
    assert score("llama", process_group="mine", resume_dir="runs") == "llama mine runs"
    assert Plan(3).extra_parameters == 3


def test_both_names_at_once_and_unknown_ones_are_refused() -> None:
    with pytest.raises(TypeError, match="must be given process_group alone"):
        score("llama", process_group="mine", group="mine")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'grup'"):
        score("llama", grup="mine")  # type: ignore[call-arg]


def test_only_the_new_names_are_seen() -> None:
    assert list(inspect.signature(score).parameters) == ["model", "process_group", "resume_dir"]
    assert (score.__name__, score.__doc__) == ("score", "What it does.")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_import_path_has_the_names_of_the_new_one(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)  # another test may have imported it
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {new}: "):
        moved = importlib.import_module(old)
    home = importlib.import_module(new)
    assert home.__all__
    for name in home.__all__:
        assert getattr(moved, name) is getattr(home, name), name


def test_scoring_takes_its_old_parameters(tmp_path: Path) -> None:
    model, batches = build("llama"), [collate(rows())]
    new = ssah.attribute(
        model, batches, process_group=None, resume_dir=tmp_path / "new", save_every_seconds=0
    )
    old = {"group": None, "state": tmp_path / "old", "save_every": 0}
    with pytest.warns(DeprecationWarning, match="is now attribute") as seen:
        found = ssah.attribute(model, batches, **old)
    told = [str(warning.message) for warning in seen]
    for parameter in old:
        assert any(f"attribute({parameter}=) is now attribute(" in each for each in told)
    assert found.scores.keys() == new.scores.keys()
    assert list((tmp_path / "old").iterdir())
    with pytest.warns(DeprecationWarning, match=r"deal\(group=\) is now deal\(process_group=\)"):
        assert list(deal(batches, group=None)) == batches  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match=r"Ranks.of\(group=\) is now Ranks.of\(process_g"):
        assert Ranks.of(group=None).size == 1  # type: ignore[call-arg]
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    with pytest.warns(DeprecationWarning, match=r"stream\(state=\) is now stream\(resume_dir=\)"):
        ssah.stream(str(folder), batches, state=tmp_path / "streamed")  # type: ignore[call-arg]
    assert list((tmp_path / "streamed").iterdir())
