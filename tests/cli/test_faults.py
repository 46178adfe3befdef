"""A mistake of the library does not look like one of its user."""

from __future__ import annotations

from typing import Any

import pytest
from commands import fails


def failing(body: str, module: str) -> Any:
    """A function of a module, which does what its user would see as ``body``."""
    namespace: dict[str, Any] = {"__name__": module}
    exec(f"def function(*given, **more):\n    {body}\n", namespace)
    return namespace["function"]


@pytest.mark.parametrize(
    ("body", "module", "code"),
    [
        ("raise TypeError('judge returned a str, must return a bool')", "ssah.evaluation", 2),
        ("raise ValueError('lr is 0, must be more')", "ssah.training", 2),
        ("raise ValueError('no such tensor')", "safetensors", 2),
        ("raise OSError('the disk is full')", "ssah.storage", 2),
        ("raise RuntimeError('the loss is nan')", "ssah.training", 1),
    ],
)
def test_what_is_meant_is_said(
    body: str, module: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssah.info.describe", failing(body, module))
    line = fails("info", code=code)
    assert line == "error: " + body.split("'")[1]


@pytest.mark.parametrize(
    ("body", "module", "kind"),
    [
        ("return None + 1", "ssah.groups", "TypeError"),
        ("a, b = (1,)", "ssah.groups", "ValueError"),
        ("return int('few')", "ssah_kernels.ops", "ValueError"),
        ("return {}['scu']", "ssah.groups", "KeyError"),
        ("raise KeyError('scu')", "ssah.groups", "KeyError"),
        ("assert given == 0", "ssah.groups", "AssertionError"),
        ("raise TypeError('forward() takes 2 arguments')", "transformers", "TypeError"),
    ],
)
def test_a_mistake_of_the_library_is_called_one(
    body: str, module: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssah.info.describe", failing(body, module))
    line = fails("info", code=1)
    assert line.startswith(f"error: {kind}: ")
    assert "a fault of ssah: SSAH_TRACEBACK=1 shows where; please report it" in line
