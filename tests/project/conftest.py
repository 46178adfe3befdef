"""What tests of the project have in common."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from pages import ROOT


@pytest.fixture(scope="session")
def distributions() -> ModuleType:
    """runs/distributions.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "distributions", ROOT / "runs" / "distributions.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
