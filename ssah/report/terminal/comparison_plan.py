"""What a comparison would do, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.terminal.tables import facts_table

if TYPE_CHECKING:
    from rich.console import RenderableType


def compare_plan(planned: Mapping[str, Any]) -> RenderableType:
    """What ``--dry-run`` found: steps, fine-tunes, answers and minutes."""
    methods = planned["methods"]
    runs = [name for name, lacking in methods.items() if lacking is None]
    others = [f"{name} {lacking}" for name, lacking in methods.items() if lacking is not None]
    by = ", ".join(planned["measured"])
    return facts_table(
        "Dry run: nothing was trained or written",
        {
            "methods": ", ".join(runs),
            "do not run": Text("\n".join(others) or "none"),  # a line each
            "steps left": f"{len(planned['left'])} of {planned['steps']}",
            "fine-tunes": planned["fine_tunes"],
            "answers": planned["answers"],
            "minutes, about": f"{planned['minutes']:.1f}",
            "by": f"steps done before ({by})" if by else "two passes of the model, measured now",
        },
    )
