"""What every method has: a registry, settings, needs, a control of its own, a command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, get_args

import pytest
from commands import as_json, call, fails
from pages import ROOT
from tiny_models import build

from ssah import methods
from ssah.methods import Inputs, Method, Trained
from ssah.methods.frame import Aim, Stage
from ssah.methods.inputs import NEEDS, Need
from ssah.methods.registry import _METHODS
from ssah.report.comparison import WHEN
from ssah.settings import setting
from ssah.units import UnitSet


@pytest.mark.parametrize("name", methods.names())
def test_a_method_says_all_that_a_table_needs(name: str) -> None:
    about = methods.describe(name)
    assert methods.method(name).name == name
    assert about["stage"] in get_args(Stage)
    assert about["aim"] in get_args(Aim)
    # Nothing that is only found, and taken out to show it, keeps refusals.
    assert about["stage"] != "locate" or about["aim"] == "remove"
    # What acts while or after a model is fine-tuned has nothing else to be for.
    assert about["stage"] not in ("during", "after") or about["aim"] == "keep"
    assert len(about["does"]) <= 39  # a line of `ssah methods`
    assert about["gives"] in ("Trained", "Procedure", "Changed", "Edited")
    for key in ("does", "paper", "equation", "control", "published"):
        assert about[key].strip(), key
    for sentence in (about["does"], about["control"], *about["departures"]):
        assert sentence.endswith("."), sentence
    assert set(about["needs"]) <= set(get_args(Need)) == set(NEEDS)
    assert "aligned" in about["needs"]
    assert all(each["help"] for each in about["settings"])
    of = type(methods.method(name))
    assert (of.strength is None) == (not of.strengths)
    defaults = {each["name"]: each["default"] for each in about["settings"]}
    assert set(of.instead) <= set(defaults) - {of.strength}
    # A strength that is None says nothing: another setting does.
    assert (of.strength is not None and defaults[of.strength] is None) == bool(of.instead)
    for value in of.strengths:  # each within the bounds of its setting
        assert getattr(methods.method(name, **{of.strength: value}), of.strength) == value


@pytest.mark.parametrize("name", methods.names())
def test_what_is_missing_is_named_before_anything_runs(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"inputs of {name!r} lack aligned (")) as told:
        methods.method(name).find(Inputs())
    assert all(f"{need} (" in str(told.value) for need in methods.describe(name)["needs"])


def test_wrong_names_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="method is 'none'; it must be one of ssah-freezing, "):
        methods.method("none")
    with pytest.raises(ValueError, match="setting of 'sppft' is 'share'; it must be one of opens"):
        methods.method("sppft", share=0.5)
    with pytest.raises(ValueError, match=r"alpha is 1\.5; it must be greater than 0 and at most 1"):
        methods.method("interpolation", alpha=1.5)
    assert methods.method("safe-delta", share=None, budget=0.2).budget == 0.2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"share of 'safe-delta' is 0\.1, and stands in the place"):
        methods.method("safe-delta", budget=0.2, share=0.1)
    with pytest.raises(TypeError, match="aligned is str; it must be a transformers model in mem"):
        methods.method("random-freezing").find(Inputs(aligned="runs/aligned"))


@dataclass(frozen=True)
class First(Method):
    """Freeze the first units."""

    name: ClassVar[str] = "first"
    paper: ClassVar[str] = "none"
    equation: ClassVar[str] = "j < n"
    stage: ClassVar[Stage] = "during"
    needs: ClassVar[tuple[Need, ...]] = ("aligned",)
    against: ClassVar[str] = "As many random units."
    published: ClassVar[str] = "Nothing."

    n: int = setting(2, "How many.", min=1)

    def _find(self, inputs: Inputs) -> Trained:
        sizes = {"model.layers.0.mlp.down_proj": 72}
        return Trained(UnitSet({name: range(self.n) for name in sizes}, sizes))


def test_a_method_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssah.methods.random_units.First", First, raising=False)
    monkeypatch.setitem(_METHODS, "first", "random_units:First")
    assert methods.describe("first")["settings"] == [
        {"name": "n", "default": 2, "help": "How many."}
    ]
    model = build("llama")
    found = methods.method("first", n=3).find(Inputs(aligned=model))
    assert isinstance(found, Trained)
    drawn = found.control(1)
    assert drawn.control(2).selection != drawn.selection == found.control(1).selection
    assert len(drawn.selection) == 3
    with found.plan(model) as plan:
        assert not plan.closed


def test_the_command_lists_and_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = as_json("methods")["methods"]
    monkeypatch.setenv("COLUMNS", "100")
    lines = [line.strip() for line in call("methods").output.splitlines()]
    headings = [lines.index(WHEN[stage]) for stage in get_args(Stage)]
    assert headings == sorted(headings)
    for each in listed:  # on one line, below the heading of its stage
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{each['name']} ")]
        above = max(heading for heading in headings if heading < place)
        assert lines[above] == WHEN[each["stage"]]
        assert each["does"] in lines[place]
        assert lines[place].split()[1] == each["aim"]
        assert ("tuned" in lines[place].split("  ")[-1]) == ("tuned" in each["needs"])
    assert [each["name"] for each in listed] == list(methods.names())
    shown = " ".join(call("methods", "sppft").output.split())
    assert "2408.17003" in shown
    assert "opens 0.1" in shown
    assert "keep: refusals stay through fine-tuning" in shown
    assert "Another run of as many layers" in shown
    shown = " ".join(call("methods", "safe-delta").output.split())
    assert "share, in the place of budget; worth a try: 0.01, 0.1, 0.5" in shown
    assert as_json("methods", "sppft") == methods.describe("sppft")
    assert "method is 'none'; it must be one of" in fails("methods", "none")


def test_the_page_has_every_method() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \|", page, flags=re.MULTILINE)
    assert rows == list(methods.names())
    text = " ".join(page.split())
    (relaxing,) = re.findall(r"^\| relax \|.*\| (.*) \|$", page, flags=re.MULTILINE)
    aims = {name: methods.describe(name)["aim"] for name in methods.names()}
    assert relaxing == ", ".join(f"`{name}`" for name, aim in aims.items() if aim == "relax")
    for name in methods.names():
        assert all(each in text for each in methods.describe(name)["departures"]), name
