"""Weights that text chooses by their scores: the highest share of what `ssah weights` wrote.

"runs/snip:0.01"        1 % of each matrix
"runs/snip:0.01:row"    1 % of each row; "model": of all weights that were scored
"""

from __future__ import annotations

import re

from torch import nn

from ssah.attribution import WeightAttribution
from ssah.selections.making import weights
from ssah.selections.selection import Selection

_FORM = re.compile(r"(?P<folder>.+):(?P<share>[0-9.]+(e-?\d+)?)(:(?P<per>row|matrix|model))?")


def has_share(text: str) -> bool:
    """Whether ``text`` is of the form above: else it is the folder of a selection."""
    return _FORM.fullmatch(text) is not None


def check_scored(text: str) -> None:
    """Refuse, before a model is loaded, what no model can have.

    Raises:
        FileNotFoundError: the folder has no scores.
        ValueError: it has something else, or the share is none.
    """
    folder, share, _ = _parts(text)
    if not 0 < share <= 1:
        raise ValueError(
            f"weights:{text} has the share {share:g}; it must be above 0 and 1 at most, a fraction "
            "of the weights"
        )
    WeightAttribution.load(folder)


def scored_weights(text: str, model: nn.Module) -> Selection:
    """The weights that ``text`` chooses.

    Raises:
        FileNotFoundError, ValueError: as of `check_scored`, or the scores are of another model.
    """
    folder, share, per = _parts(text)
    return weights(model, WeightAttribution.load(folder, model).top(share, per))


def _parts(text: str) -> tuple[str, float, str]:
    """Folder, share, and what weights are ranked with."""
    found = _FORM.fullmatch(text)
    assert found is not None
    try:
        share = float(found["share"])
    except ValueError:
        raise ValueError(
            f"weights:{text} has the share {found['share']!r}; it must be a number"
        ) from None
    return found["folder"], share, found["per"] or "matrix"
