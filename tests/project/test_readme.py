"""Python of the pages runs as pasted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ssah.models.loading

ROOT = Path(__file__).parents[2]


def run(page: str) -> dict[str, Any]:
    """Runs a page's Python, one example after the other, and gives the names that it leaves."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile("\n".join(examples), page, "exec"), names)
    return names


def test_the_examples_of_the_readme(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Everything is as in README but the model, which is a tiny one under the same name.
    loader = ssah.models.load_model

    def load(name: str, **options: Any) -> Any:
        assert name == "smollm2"
        return loader(str(tiny_chat_folder), **options)

    monkeypatch.setattr(ssah.models, "load_model", load)
    monkeypatch.chdir(tmp_path)
    names = run("README.md")
    assert len(names["groups"]["scu"]) > 0
    assert names["plan"].closed
    assert names["trainer"].state.global_step == 10


def test_the_examples_about_operators() -> None:
    names = run("docs/operators.md")
    x = names["x"].flatten(0, 1).double()
    torch.testing.assert_close(names["variance"], x.var(0), rtol=1e-5, atol=0)
    assert names["weight"][0].ne(names["weight"].detach()[3]).any()


def test_every_link_between_pages_leads_to_a_file() -> None:
    pages = [ROOT / "README.md", ROOT / "csrc" / "README.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"
