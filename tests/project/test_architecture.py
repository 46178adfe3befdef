"""The page about the house: its tree is what is there, and its recipes lead to the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import ROOT, blocks, run_python
from typer.testing import CliRunner

import ssah
from ssah.cli.running import as_command
from ssah.evaluation import judge
from ssah.evaluation.judges import Keywords
from ssah.models import load_model

PAGE = "docs/architecture.md"
LEFT_OUT = {"__init__.py", "__pycache__", "py.typed"}


def rooms() -> list[str]:
    """What stands in ssah/, in the order of the page."""
    tree = next(block.text for block in blocks(PAGE) if block.language == "text")
    return re.findall(r"^    ([\w.]+)", tree, flags=re.MULTILINE)


def test_the_tree_has_every_room() -> None:
    there = {path.name for path in (ROOT / "ssah").iterdir()} - LEFT_OUT
    assert sorted(rooms()) == sorted(there), f"bring the tree in {PAGE} up to date"


def test_the_tree_is_in_the_order_of_the_imports() -> None:
    """An import goes down the list: the contract that `make lint` checks has the same order."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contract = re.search(r"^layers = \[\n(.*?)^\]", project, flags=re.DOTALL | re.MULTILINE)
    assert contract is not None
    levels = re.findall(r'^  "(.*)",', contract[1], flags=re.MULTILINE)
    level = {name: i for i, line in enumerate(levels) for name in re.findall(r"ssah\.(\w+)", line)}
    order = [level[name.removesuffix(".py")] for name in rooms()]
    assert order == sorted(order)


@pytest.fixture
def names(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What the blocks of the page leave behind."""
    (tmp_path / "smollm2").symlink_to(tiny_chat_folder)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for block in blocks(PAGE):
        if block.language == "python":
            run_python(block, found)
    return found


def test_the_recipes_lead_to_the_end(names: dict[str, Any]) -> None:
    # An architecture: both kinds of module in both layers, of the sizes that its settings say.
    units = {name: module.n_units for name, module in ssah.find_modules(names["bird"]).items()}
    layers = [f"model.layers.{layer}" for layer in range(2)]
    assert units == {f"{layer}.mlp.down_proj": 48 for layer in layers} | {
        f"{layer}.self_attn.o_proj": 32 for layer in layers
    }
    # A judge: a function, and a class.
    requests, answers = ["a", "b"], ["Sure, this is how it is done.", "No."]
    for each in (names["begins_with_sure"], names["Short"].parse("3")):
        assert judge(each)(requests, answers) == [True, False]
    own = next(block.text for block in blocks(PAGE) if block.language == "json")
    assert Keywords.from_data(json.loads(own), PAGE)(requests, ["Sure.", " no way"]) == [
        True,
        False,
    ]
    # A study: the page has run it, and running it again computes nothing.
    again = names["redundant"](
        names["Loading"]("./smollm2"), "runs/redundant", names["RedundantSettings"]()
    )
    assert again["result"] == names["found"]
    # A command: what it prints for programs is true.
    app = typer.Typer()
    app.command()(as_command(names["count"]))
    told = CliRunner().invoke(app, ["./smollm2", "--kind", "mlp", "--kind", "attention", "--json"])
    model, _ = load_model("./smollm2")
    expected = sum(module.n_units for module in ssah.find_modules(model).values())
    assert json.loads(told.stdout) == {"units": expected}
