"""Sources and settings of studies that take seconds on the tiny chat model."""

from __future__ import annotations

from pathlib import Path

from ssah.studies.scan.settings import ScanSettings
from ssah.studies.training.settings import BudgetSettings, FreezeSettings

SOURCES = {"safety": "builtin:safety[0:16]", "utility": "builtin:utility[0:16]"}
MEASURED = {"requests": ["builtin:safety_eval[0:6]"], "utility_eval": "builtin:utility_eval[0:6]"}
SCAN = ScanSettings(
    shares=(0.05, 0.1),
    ru_shares=(0.1, 0.2),
    asr=4,
    max_new_tokens=40,
    compare=True,
    compare_shares=(0.05,),
    batch_size=3,  # the answers of a point are two steps
)
QUICK = {"max_steps": 3, "lr": 1e-3, "sample": 6, "check_every": 1, "max_new_tokens": 40, "asr": 4}
BUDGET = BudgetSettings(**QUICK, ru=0.3, patience=1.5)
FREEZE = FreezeSettings(
    **QUICK, seeds=(0, 1), arms=("none", "scu-cu", "random", "lora"), scu=0.05, ucu=0.05
)


def tree(folder: Path) -> dict[str, float]:
    """Files below a folder -> when each was last written."""
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}
