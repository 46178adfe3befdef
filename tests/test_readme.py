"""The README's Python runs as pasted, one example after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ssah.models

README = Path(__file__).parents[1] / "README.md"


def test_examples_run_as_pasted(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Everything is as in README but the model, which is a tiny one under the same name.
    loader = ssah.models.load_model

    def load(name: str, **options: Any) -> Any:
        assert name == "smollm2"
        return loader(str(tiny_chat_folder), **options)

    monkeypatch.setattr(ssah.models, "load_model", load)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) == 2
    names: dict[str, Any] = {}
    exec(compile("\n".join(examples), "README.md", "exec"), names)
    assert len(names["groups"]["scu"]) > 0
    assert names["plan"].closed
    assert names["trainer"].state.global_step == 10
