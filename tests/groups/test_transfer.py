"""Attribute transfer against a loop over units, and the package's public names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import ssah
from ssah.cli import app
from ssah.groups import GROUPS, UnitGroups, classify
from ssah.report.pictures.transfer import plot_transfer
from ssah.studies import transfer_summary
from ssah.studies.run_folder import read_run

SIZES = {"layers.0.o": 7, "layers.0.down": 11, "layers.10.down": 5}


def random_groups(seed: int, scope: Any = "module", sizes: dict[str, int] = SIZES) -> UnitGroups:
    generator = torch.Generator().manual_seed(seed)
    safety, utility = (
        {name: torch.rand(n, generator=generator) for name, n in sizes.items()} for _ in range(2)
    )
    return classify(safety, utility, scu=0.15, ucu=0.2, ru=0.3, scope=scope)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from(["module", "model"]))
def test_transfer_equals_a_loop(before_seed: int, after_seed: int, scope: str) -> None:
    before, after = random_groups(before_seed, scope), random_groups(after_seed, scope)
    moved = ssah.transfer(before, after)
    assert moved.groups == GROUPS == ("scu", "ucu", "ru", "cu")
    assert moved.matrix.dtype == torch.float64
    expected = [[0] * 4 for _ in range(4)]
    for name, n in SIZES.items():
        for unit in range(n):
            i, j = (
                next(k for k, group in enumerate(GROUPS) if unit in groups[group][name].tolist())
                for groups in (before, after)
            )
            expected[i][j] += 1
    assert moved.matrix.tolist() == [[count / 23 for count in row] for row in expected]
    assert float(moved.matrix.sum()) == pytest.approx(1)
    for k, group in enumerate(GROUPS):
        assert float(moved.matrix[k].sum()) == pytest.approx(before[group].fraction)
        assert float(moved.matrix[:, k].sum()) == pytest.approx(after[group].fraction)


def test_nothing_moves_to_itself() -> None:
    groups = random_groups(0)
    matrix = ssah.transfer(groups, groups).matrix
    assert torch.equal(matrix, matrix.diag().diag())


def test_table() -> None:
    lines = str(ssah.transfer(random_groups(0), random_groups(0))).splitlines()
    assert lines[0].split() == ["before", "\\", "after", *GROUPS]
    assert [line.split()[0] for line in lines[1:]] == list(GROUPS)


def test_different_scopes_are_refused() -> None:
    groups = random_groups(0)
    with pytest.raises(ValueError, match=r"groups_before has scope 'module'.*'model'"):
        ssah.transfer(groups, random_groups(0, "model"))
    with pytest.raises(ValueError, match=r"layers\.0\.o has 7 units before and 8 after"):
        ssah.transfer(groups, random_groups(0, sizes=SIZES | {"layers.0.o": 8}))
    fewer = {name: n for name, n in SIZES.items() if name != "layers.0.down"}
    with pytest.raises(ValueError, match=r"layers\.0\.down has 11 units before and no after"):
        ssah.transfer(groups, random_groups(0, sizes=fewer))


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_is_cheap() -> None:
    python("import sys, ssah; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)")


@pytest.mark.exhaustive  # the module has another name than the function since it was not
def test_transfer_is_the_function_whatever_is_imported_first() -> None:
    python(
        "import ssah.groups.transfers; from ssah.groups.transfers import transfer; import ssah;"
        "assert ssah.transfer is transfer and callable(transfer)"
    )


def test_public_names() -> None:
    for name in ssah.__all__:
        assert getattr(ssah, name) is not None
        assert name in dir(ssah)
    assert ssah.classify is classify
    assert isinstance(ssah.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'classifyy'"):
        ssah.classifyy  # noqa: B018


# ------------------------------------------------------------------------- the command, a picture


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Groups before and after, saved."""
    for seed, name in enumerate(("before", "after")):
        random_groups(seed).save(tmp_path / name)
    return tmp_path / "before", tmp_path / "after"


def call(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_the_command_without_a_folder(folders: tuple[Path, Path]) -> None:
    found = json.loads(call("transfer", *folders, "--json").stdout)
    moved = ssah.transfer(random_groups(0), random_groups(1))
    assert found["matrix"] == moved.matrix.tolist()
    assert found["groups"] == list(GROUPS)
    assert found["units"] == sum(SIZES.values())
    for i, group in enumerate(GROUPS):
        row = moved.matrix[i]
        assert found["kept"][group] == pytest.approx(float(row[i] / row.sum()))
    shown = " ".join(call("transfer", *folders).stdout.split())
    assert "SCU" in shown
    assert f"{found['matrix'][3][3]:.2%}" in shown


def test_the_command_with_a_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = json.loads(call("transfer", *folders, "--out", out, "--json").stdout)
    record = read_run(out)
    assert record["kind"] == "transfer"
    assert record["finished"]
    assert found == {"out": str(out), **record["result"]}
    assert record["pictures"] == ["transfer.png"]
    assert (out / "transfer.png").read_bytes().startswith(b"\x89PNG")
    prints = {role: record["data"][role]["fingerprint"] for role in ("before", "after")}
    assert prints["before"] != prints["after"]
    call("transfer", *folders, "--out", out)  # the same again
    error = call("transfer", *reversed(folders), "--out", out, code=2).stderr
    assert "take another folder" in error


def test_an_empty_group_and_nothing_that_moves(tmp_path: Path) -> None:
    scores = {"down": torch.arange(10.0)}
    groups = classify(scores, scores, scu=0.0, ucu=0.0, ru=0.2)
    found = transfer_summary(ssah.transfer(groups, groups), groups, groups)
    assert found["kept"] == {"scu": None, "ucu": None, "ru": 1.0, "cu": 1.0}
    every = classify(scores, scores, scu=0.0, ucu=0.0, ru=0.0)
    path = plot_transfer(ssah.transfer(every, every), tmp_path / "picture.png", "All complex")
    assert path.is_file()


def test_groups_of_other_units_are_refused(tmp_path: Path) -> None:
    random_groups(0).save(tmp_path / "a")
    random_groups(0, sizes=SIZES | {"layers.0.o": 8}).save(tmp_path / "b")
    error = call("transfer", tmp_path / "a", tmp_path / "b", code=2).stderr
    assert "7 units before and 8 after" in error
