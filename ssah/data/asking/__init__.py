"""What a model is asked, with what is known of it: categories, a policy, several right letters."""

from __future__ import annotations

from ssah.data.asking.asked import Asked, draw_by_category, drop_category, drop_seen, load_asked
from ssah.data.asking.lettered import Lettered, load_lettered
from ssah.data.asking.policies import policy_pairs
from ssah.data.asking.salad import SALAD_SETS, load_salad

__all__ = [
    "SALAD_SETS",
    "Asked",
    "Lettered",
    "draw_by_category",
    "drop_category",
    "drop_seen",
    "load_asked",
    "load_lettered",
    "load_salad",
    "policy_pairs",
]
