"""What cannot be grouped is refused by name; what groups know of where they come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from group_scores import attribution, tensors

from ssah.groups import UnitGroups, classify, transfer
from ssah.units import UnitSet


def test_metadata_of_attributions_is_kept() -> None:
    safety, utility = attribution(data_fingerprint="s"), attribution(data_fingerprint="u")
    groups = classify(safety, utility, scu=0, ucu=0, ru=0)
    assert groups.metadata == {
        "metric": "variance",
        "tokens": "labels",
        "model_name": "tiny",
        "units_hash": "c0ffee",
        "weights_hash": None,
        "data_fingerprint": {"safety": "s", "utility": "u"},
    }


def test_the_same_data_for_both_is_refused() -> None:
    with pytest.raises(ValueError, match="measured on the same data"):
        classify(attribution(), attribution(), scu=0.25, ucu=0.25, ru=0)


def test_defaults_are_those_that_were_measured_best(tmp_path: Path) -> None:
    scores = {"a": torch.arange(8.0), "b": 100 * torch.arange(8.0).flip(0)}
    other = {"a": torch.arange(8.0).flip(0), "b": 70 * torch.arange(8.0)}
    shares = {"scu": 0.2, "ucu": 0.1, "ru": 0.1}
    best = classify(scores, other, **shares, scope="model", normalize="zscore")
    assert classify(scores, other, **shares) == best
    assert classify(scores, other, **shares, scope="module", normalize="none") != best
    for name, data, role in (("s", "harm", scores), ("u", "help", other)):
        attribution({key: x.double() for key, x in role.items()}, data_fingerprint=data).save(
            tmp_path / name
        )
    folders = [str(tmp_path / name) for name in ("s", "u", "groups")]
    given = [f"--{name}={share}" for name, share in shares.items()]
    call("classify", *folders[:2], *given, "--out", folders[2])
    assert dict(UnitGroups.load(folders[2])) == dict(best)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metric": "norm"}, "metric.*'variance'.*'norm'"),
        ({"tokens": "all"}, "tokens.*'labels'.*'all'"),
        ({"model_name": "other"}, "model_name.*'tiny'.*'other'"),
        ({"units_hash": "beef"}, "units of the model.*'c0ffee'.*'beef'"),
    ],
)
def test_attributions_that_differ_are_refused(changed: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classify(attribution(), attribution(**changed), scu=0, ucu=0, ru=0)


def test_attribution_with_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match="safety is Attribution and utility is dict"):
        classify(attribution(), {"a": torch.zeros(4)}, scu=0, ucu=0, ru=0)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((-0.1, 0, 0), "scu is -0.1"),
        ((0, 1.1, 0), "ucu is 1.1"),
        ((0, 0, math.nan), "ru is nan"),
        ((0.5, 0.3, 0.3), r"scu \+ ucu \+ ru is 0.5 \+ 0.3 \+ 0.3 = 1.1"),
    ],
)
def test_impossible_shares_are_refused(shares: tuple[float, ...], words: str) -> None:
    scores = {"a": torch.zeros(4)}
    with pytest.raises(ValueError, match=words):
        classify(scores, scores, scu=shares[0], ucu=shares[1], ru=shares[2])


@pytest.mark.parametrize("share", ["0.1", None, True])
def test_shares_that_are_no_numbers_are_refused(share: Any) -> None:
    scores = {"a": torch.zeros(4)}
    with pytest.raises(TypeError, match="scu is"):
        classify(scores, scores, scu=share, ucu=0, ru=0)


@pytest.mark.parametrize(
    ("safety", "utility", "words"),
    [
        ({"a": [0.0]}, {}, "utility has no modules"),
        ({"a": [0.0], "b": [0.0]}, {"a": [0.0]}, "utility lacks 1 .*of safety, b"),
        ({"a": [0.0]}, {"a": [0.0], "b": [0.0]}, "safety lacks 1 .*of utility, b"),
        ({"a": [0.0]}, {"a": [0.0, 1.0]}, "a has 1 units in safety and 2 in utility"),
        ({"a": [0.0, math.nan]}, {"a": [0.0, 1.0]}, "safety: 1 of 2 scores of a are NaN"),
        ({"a": [0.0, 1.0]}, {"a": [math.inf, 1.0]}, "utility: 1 of 2 scores of a .*infinite"),
        ({"a": [[0.0]]}, {"a": [[0.0]]}, r"safety: .*a have shape \[1, 1\]"),
        ({"a": []}, {"a": []}, r"safety: .*a have shape \[0\]"),
    ],
)
def test_unusable_scores_are_refused(safety: Any, utility: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classify(tensors(safety), tensors(utility), scu=0, ucu=0, ru=0)


def test_unknown_choices_are_refused() -> None:
    scores = {"a": torch.arange(10.0)}
    with pytest.raises(ValueError, match=r"scope is 'layer'.*module, model"):
        classify(scores, scores, scu=0, ucu=0, ru=0, scope="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"normalize is 'max'.*none, zscore, rank"):
        classify(scores, scores, scu=0, ucu=0, ru=0, normalize="max")  # type: ignore[arg-type]
    groups = classify(scores, scores, scu=0.1, ucu=0, ru=0)
    with pytest.raises(ValueError, match="group is 'esu'"):
        groups.top("esu", 0.1)
    with pytest.raises(ValueError, match="by is 'score'"):
        groups.top("scu", 0.1, by="score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fraction is 0.2; the group scu is 0.1 of all units"):
        groups.top("scu", 0.2)
    with pytest.raises(ValueError, match=r"fraction is 1.5"):
        groups.top("scu", 1.5)


def test_groups_must_be_disjoint_and_complete() -> None:
    scores = {"a": torch.arange(4.0)}
    good = dict(classify(scores, scores, scu=0.25, ucu=0.25, ru=0.25))
    arguments: dict[str, Any] = {
        "safety": scores,
        "utility": scores,
        "shares": {"scu": 0.25, "ucu": 0.25, "ru": 0.25},
    }
    UnitGroups(good, **arguments)
    nothing = UnitSet({}, {"a": 4})
    with pytest.raises(ValueError, match="is in 0 groups"):
        UnitGroups(good | {"ru": nothing}, **arguments)
    with pytest.raises(ValueError, match="is in 2 groups"):
        UnitGroups(good | {"ru": good["ru"] | good["scu"]}, **arguments)
    with pytest.raises(ValueError, match="a has 4 units in safety and 5 in group ru"):
        UnitGroups(good | {"ru": UnitSet({}, {"a": 5})}, **arguments)
    with pytest.raises(ValueError, match="groups are named"):
        UnitGroups({"scu": nothing}, **arguments)


@pytest.mark.parametrize("wrong", [None, [1.0], 3])
def test_what_is_no_attribution_is_named(wrong: object) -> None:
    with pytest.raises(TypeError, match="both must be Attribution, or both mappings"):
        classify(wrong, wrong, scu=0.1, ucu=0.1, ru=0.1)
    with pytest.raises(TypeError, match="groups_before is"):
        transfer(wrong, wrong)
