"""CoSApien: requests that people wrote for five real uses of a model, with the policy of each use.

    prompt      what is asked
    scenario    the policy, which is the system prompt
    type        allowed, disallowed, partial: whether the policy allows an answer; safe: any would

Example: of a studio that makes games, a fight is "allowed", an insult of a religion "disallowed",
and a fight with such an insult in it "partial".

Source: J. Zhang et al., Controllable Safety Alignment, ICLR 2025 (arXiv 2410.08968); the fields are
those of the data set's card, microsoft/CoSApien, and the words of ``type`` those of a published
reader of it. Another word is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssah.data.fields import DataError, column_of

SCENARIO, TYPE = "scenario", "type"
_ALLOWED = {"safe": True, "allowed": True, "disallowed": False, "partial": None}


def is_cosapien(row: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of the set, and none of those of other policies."""
    own = (column_of(row, name) for name in (SCENARIO, TYPE))
    others = (column_of(row, name) for name in ("system_prompt", "policy", "allowed"))
    return None not in own and not any(others)


def allowed_by_type(row: Mapping[str, Any], where: str) -> bool | None:
    """Whether the policy of a row allows an answer; None: a part of one.

    Raises:
        DataError: beginning with ``where``: its type is none of the four.
    """
    said = row[column_of(row, TYPE) or TYPE]
    word = str(said).strip().lower()
    if word not in _ALLOWED:
        raise DataError(f"{where}: 'type' must be one of {', '.join(_ALLOWED)}, was {said!r}")
    return _ALLOWED[word]
