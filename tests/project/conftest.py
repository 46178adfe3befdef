"""What tests of the project have in common."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
from pages import ROOT


@pytest.fixture
def distributions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """runs/distributions.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "runs")
    return import_module("distributions")
