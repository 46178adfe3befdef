"""Attribute transfer against a loop over units, and the package's public names."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ssah
from ssah.groups import GROUPS, UnitGroups, classify

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


def test_transfer_is_the_function_whatever_is_imported_first() -> None:
    python(
        "import ssah.transfer; from ssah.transfer import transfer; import ssah;"
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
