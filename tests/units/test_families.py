"""Every family scores, ablates and trains as computed otherwise; `ssah info` tells of models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from commands import as_json, call, fails
from family_checks import CHECKS, SHARDED, TABLE, TINY, check, model_type, table
from plans import masks

from ssah.units import UnitSet, families, find_modules


def cases() -> Iterator[Any]:
    """Every tiny model in every column; one pair of processes serves a whole column."""
    for column in CHECKS:
        pair = [pytest.mark.xdist_group("sharded families")] if column == "FSDP2" else []
        for family in TINY:
            always = family in (SHARDED if column == "FSDP2" else tiny_models.CHOSEN)
            marks = pair if always else [*pair, pytest.mark.exhaustive]
            yield pytest.param(family, column, marks=marks)


@pytest.mark.filterwarnings("ignore:.*fewer than two:UserWarning")
@pytest.mark.parametrize(("family", "column"), cases())
def test_every_family(family: str, column: str) -> None:
    check(family, column)


def test_every_entry_has_a_tiny_model() -> None:
    assert {model_type(family) for family in TINY} == set(families.FAMILIES)
    always = [families.FAMILIES[model_type(family)] for family in tiny_models.CHOSEN]
    rare = [name for name, entry in families.FAMILIES.items() if entry not in always]
    assert not rare, "add a tiny model of each to CHOSEN in tests/helpers/tiny_models.py"


def test_the_table_in_the_docs_is_what_the_checks_say() -> None:
    assert TABLE.read_text() == table(), "run: python tests/helpers/family_checks.py"


# ------------------------------------------------------------------------------------- ssah info


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a folder with nothing but a configuration."""

    def write(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def info(path: Path) -> dict[str, Any]:
    return as_json("info", "--model", path)["model"]


@pytest.mark.parametrize(
    "family",
    ["llama_bias", "falcon_new", "gemma3n", "gpt2", "qwen3_next_experts", "gemma4_experts"],
)
def test_info_needs_a_configuration_alone(family: str, folder: Any) -> None:
    model = tiny_models.build(family)
    found = info(folder(model.config.to_dict()))
    modules = find_modules(model).values()
    assert found["class"] == type(model).__name__
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["units"] == sum(module.n_units for module in modules)
    for kind, each in found["kinds"].items():
        own = [module.n_units for module in modules if module.kind == kind]
        assert each["modules"] == len(own)
        assert [size for size, n in each["sizes"] for _ in range(n)] == sorted(own)
    chosen = UnitSet(
        {m.name: range(m.n_units) for m in modules}, {m.name: m.n_units for m in modules}
    )
    owned = masks(model, chosen, "train_only")
    assert found["owned"] == sum(int(mask.sum()) for mask in owned.values())


def test_info_of_a_large_model_takes_no_memory(folder: Any) -> None:
    found = info(folder({"model_type": "llama", "dtype": "bfloat16"}))  # the defaults are Llama-7B
    assert found["parameters"] == 6_738_415_616
    assert found["dtype"] == "bfloat16"
    assert found["kinds"]["mlp"] == {"modules": 32, "units": 32 * 11008, "sizes": [[11008, 32]]}
    assert found["units"] == 32 * (11008 + 4096)
    assert found["not_covered"] == []


def test_info_names_what_is_not_covered(folder: Any) -> None:
    path = folder({"model_type": "qwen3_next", "num_hidden_layers": 8, "num_experts": 8})
    found = {part["part"]: part for part in info(path)["not_covered"]}
    assert found["linear_attn"]["layers"] == [0, 1, 2, 4, 5, 6]
    assert found["linear_attn"]["instead_of"] == "attention"
    assert len(found) == 1
    shown = call("info", "--model", path).stdout
    assert "0-2, 4-6" in shown
    assert "linear attention" in shown


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "unknown architecture 'bert'.*ssah.register_family('bert'"),
        ({"model_type": "mamba"}, "'mamba', which has no depth-2 modules.*no V -> O"),
        ({"model_type": "abacus"}, "model type `abacus`.*ssah.register_family"),
        ({}, "cannot be read.*model_type"),
    ],
)
def test_info_says_what_to_do_about_other_models(
    config: dict[str, Any], message: str, folder: Any
) -> None:
    pattern = message.replace("(", r"\(")
    assert re.search(pattern, fails("info", "--model", folder(config)))
