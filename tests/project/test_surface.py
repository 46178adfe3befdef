"""The public surface changes only when somebody means it to."""

from __future__ import annotations

import difflib
from pathlib import Path

from helpers import surface

LIST = Path(surface.__file__).with_name("surface.txt")


def test_the_public_surface_is_the_list_in_surface_txt() -> None:
    kept = LIST.read_text(encoding="utf-8").splitlines()
    changes = list(
        difflib.unified_diff(kept, surface.surface(), "surface.txt", "now", lineterm="", n=0)
    )
    assert not changes, "\n".join([*changes, surface.__doc__ or ""])
