"""A study that is made as `ssah.studies.study` says: one file, which runs, goes on and refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_studies import MEASURED, SOURCES, tree

from ssah.settings import check_settings, setting
from ssah.studies.claims import claim
from ssah.studies.loading import Loading
from ssah.studies.measured_values import losses
from ssah.studies.paired_measures import UTILITY, Evaluation
from ssah.studies.run_folder import read_run
from ssah.studies.study import Study, grouped


@dataclass(frozen=True)
class ShareSettings:
    share: float = setting(0.1, "Of RU.", above=0, max=1)
    scope: str = "module"
    normalize: str = "none"
    tokens: str = "labels"
    judges: tuple[str, ...] = ("zou2023",)
    max_new_tokens: int = 8
    batch_size: int = 4
    max_length: int = 256

    def __post_init__(self) -> None:
        check_settings(self)


def redundant(loading: Loading, out: Path, settings: ShareSettings) -> dict[str, Any]:
    """What ablating redundant units costs."""
    study = Study(loading, out, "redundant", settings, batch_size=settings.batch_size)
    rows = study.scored_rows(**SOURCES)
    requests = study.sources.requests("requests", MEASURED["requests"])
    held_out = study.sources.rows("utility_eval", MEASURED["utility_eval"])
    study.load()
    evaluation = Evaluation(study, requests, {UTILITY: held_out}, asked=0)
    with study.under_way(5) as steps:
        groups = grouped(settings, study.scores(rows), ru=settings.share)
        units = {"intact": None, "ablated": groups["ru"]}
        found = {
            name: steps(name, lambda own=own: evaluation.measure(study.model, own))
            for name, own in units.items()
        }
    pair = losses(found["ablated"], UTILITY), losses(found["intact"], UTILITY)
    costs = claim("Ablating RU costs utility", *pair, "higher", "nats", among="rows")
    return steps.run.finish({"units": len(groups["ru"]), "claims": [costs]})


def test_a_study_is_one_file(loading: Loading, tmp_path: Path) -> None:
    record = redundant(loading, tmp_path, ShareSettings())
    assert record == read_run(tmp_path)
    assert record["result"]["units"] == 18  # 6 of 64 units in each of two modules, 3 of 32 in two
    assert set(record["data"]) == {"safety", "utility", "requests", "utility_eval"}
    assert record["settings"]["share"] == 0.1
    (cost,) = record["result"]["claims"]
    assert cost["interval"][0] <= cost["value"] <= cost["interval"][1]
    steps = tree(tmp_path / "steps")
    assert {Path(path).stem for path in steps} == {
        "precision", "score-safety-labels", "score-utility-labels", "intact", "ablated",
    }  # fmt: skip
    assert redundant(loading, tmp_path, ShareSettings())["result"] == record["result"]
    assert tree(tmp_path / "steps") == steps
    with pytest.raises(ValueError, match=r"share 0\.1, not 0\.2"):
        redundant(loading, tmp_path, ShareSettings(share=0.2))
