"""The commit of this checkout; needs Python alone."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """As git describes it, with "-dirty" where files differ; "unknown" where there is no git."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return described.stdout.strip() or "unknown"
