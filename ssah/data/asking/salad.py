"""The four sets of SALAD-Bench: which fields each has.

    base_set               qid, question, source
    attack_enhanced_set    aid, augq, baseq, method
    defense_enhanced_set   did, daugq, dmethod
    mcq_set                mcq, baseq, choices, gt                 and 1-, 2-, 3-category in all

Source: L. Li et al., SALAD-Bench, ACL 2024 Findings (arXiv 2402.05044); the data set's card,
OpenSafetyLab/Salad-Data. Copies of it are about under other field names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from ssah.data.asking.asked import Asked, check_asked
from ssah.data.counts import Counts
from ssah.data.fields import Columns, DataError, column_of, has_fields
from ssah.data.rows import Invalid, read

PATH = ("1-category", "2-category", "3-category")  # domain, task, category
# The fields of a set; of the first three what is asked, and what else tells rows apart.
SALAD_SETS = {
    "base_set": ("qid", "question", "source"),
    "attack_enhanced_set": ("aid", "augq", "baseq", "method"),
    "defense_enhanced_set": ("did", "daugq", "dmethod"),
    "mcq_set": ("mcq", "baseq", "choices", "gt"),
}
_TELLING = {
    "base_set": "source",
    "attack_enhanced_set": "method",
    "defense_enhanced_set": "dmethod",
}


def load_salad(
    source: str | os.PathLike[str],
    config: str,
    limit: int | None = None,
    *,
    invalid: Invalid = "error",
    counts: Counts | None = None,
) -> list[Asked]:
    """Read a file of SALAD-Bench, whose fields are all checked.

    Args:
        source: a file on this machine (JSON, JSON lines, CSV or parquet), or as
            `ssah.data.load_requests` takes it.
        config: ``"base_set"``, ``"attack_enhanced_set"`` or ``"defense_enhanced_set"``.
        limit, invalid, counts: as `ssah.data.load_requests` takes them.

    Returns:
        Rows whose categories are the three of the set's path, and ``source``, ``method`` or
        ``dmethod``, by which `ssah.data.drop_category` leaves rows out.

    Raises:
        DataError: a row lacks a field, which is named with those that it has; or it is a row of
            another of the sets.
        ValueError: there is no such set, or it has no requests: `ssah.data.load_lettered` reads
            ``mcq_set``.
    """
    if config not in _TELLING:
        what = "is read by load_lettered" if config in SALAD_SETS else "is no set of SALAD-Bench"
        raise ValueError(
            f"config is {config!r}, which {what}; must be one of {', '.join(_TELLING)}"
        )
    check = partial(_check_salad, config=config)
    return list(read(source, check, None, limit, invalid, Counts() if counts is None else counts))


def set_of(row: Mapping[str, Any]) -> str | None:
    """The set of SALAD-Bench that has all of its own fields in a row; None: no such set."""
    return next(
        (name for name, keys in SALAD_SETS.items() if all(column_of(row, k) for k in keys)), None
    )


def _check_salad(row: Any, where: str, config: str) -> Asked:
    own = has_fields(row, where)
    lacking = [key for key in (*SALAD_SETS[config], *PATH) if column_of(own, key) is None]
    if lacking:
        other = set_of(own)
        told = f"; it is a row of {other}" if other not in (None, config) else ""
        raise DataError(
            f"{where}: a row of {config} lacks {', '.join(map(repr, lacking))}, has "
            f"{', '.join(map(repr, own))}{told}"
        )
    prompt = column_of(own, SALAD_SETS[config][1])  # named: a row may have `question` and `augq`
    return check_asked(own, where, columns=Columns(prompt), by=(*PATH, _TELLING[config]))
