"""Results of another writer: the checksum is right, and a field or a tensor is not what it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ssah.attribution import Attribution, attribute
from ssah.evaluation import Probe
from ssah.groups import UnitGroups, classify
from ssah.models import weights_hash
from ssah.storage import META, public_name, result_card, save_tensors
from ssah.training import freeze, load_update

pytestmark = pytest.mark.xdist_group("stored")  # its fixtures are made once

Tensors = dict[str, Tensor]
Meta = dict[str, Any]
MISSING = object()
OTHERS = (
    MISSING,
    None,
    True,
    3,
    -1,
    1.5,
    float("nan"),
    "x",
    "",
    [],
    ["x"],
    {},
    {"x": []},
    [[[[]]]],
)

# What may stand in a field, or be left out, without any harm: it only tells people something.
FREE: dict[str, dict[str, Callable[[Any], bool]]] = {
    "attribution": {
        "model_name": lambda value: isinstance(value, str),
        "units_hash": lambda value: value in (MISSING, None) or isinstance(value, str),
        "weights_hash": lambda value: value in (MISSING, None) or isinstance(value, str),
        "data_fingerprint": lambda value: isinstance(value, str),
        "all_experts": lambda value: value is True,
        "version": lambda value: isinstance(value, str),
        "rows_read": lambda value: value in (MISSING, None) or isinstance(value, dict),
        "format": lambda value: True,
    },
    "groups": {
        **dict.fromkeys(
            ("metric", "tokens", "model_name", "units_hash", "weights_hash"),
            lambda value: value in (MISSING, None) or isinstance(value, str),
        ),
        "data_fingerprint": lambda value: value in (MISSING, None) or isinstance(value, dict),
        "format": lambda value: True,
        "version": lambda value: True,
    },
    "update": {
        "base_model": lambda value: isinstance(value, str),
        # An update of before has none. Another one is another model's.
        "units_hash": lambda value: value in (MISSING, None),
        "weights_hash": lambda value: True,
        "fingerprint": lambda value: True,
        "keep": lambda value: value is True,
        "experts": lambda value: value is MISSING or value == [],
        "single": lambda value: value is MISSING or value == [],
        "format": lambda value: True,
        "version": lambda value: True,
    },
    "probe": {
        **dict.fromkeys(
            ("model_name", "refusal_opening", "compliance_opening", "version"),
            lambda value: isinstance(value, str),
        ),
        **dict.fromkeys(
            ("units_hash", "weights_hash"),
            lambda value: value in (MISSING, None) or isinstance(value, str),
        ),
        "format": lambda value: True,
    },
}


def model() -> PreTrainedModel:
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensors, Meta]]:
    """What each kind of result holds, as it was written."""
    folder = tmp_path_factory.mktemp("saved")
    batches = [[tiny_models.collate(tiny_models.rows((9, 5), seed=seed))] for seed in (1, 2)]
    safety, utility = (attribute(model(), own) for own in batches)
    safety.save(folder / "attribution")
    groups = classify(safety, utility, scu=0.1, ucu=0.1, ru=0.3)
    groups.save(folder / "groups")
    plan = freeze(model(), groups["scu"])
    plan.save_pretrained(folder / "update")
    distances = torch.rand(3, 2, 4, dtype=torch.float64)
    about = dict.fromkeys(("model_name", "refusal_opening", "compliance_opening", "version"), "x")
    about |= {"units_hash": "x", "weights_hash": "x"}
    Probe(distances, distances + 1, distances.mean(0), about).save(folder / "probe")
    return {kind: _read(folder / kind) for kind in LOAD}


def _read(folder: Path) -> tuple[Tensors, Meta]:
    (file,) = folder.glob("*.safetensors")
    meta = json.loads((folder / META).read_text())
    for key in ("tensors", "sha256", "meta_sha256"):
        del meta[key]
    return load_file(file), meta


LOAD: dict[str, Callable[[Path], Any]] = {
    "attribution": Attribution.load,
    "groups": UnitGroups.load,
    "update": lambda folder: load_update(model(), folder),
    "probe": Probe.load,
}


def refusal(kind: str, folder: Path) -> str:
    """What is said of a folder that is refused."""
    with pytest.raises(ValueError, match=r".+") as raised:
        LOAD[kind](folder)
    return str(raised.value)


def fields(kind: str, meta: Meta) -> Iterator[tuple[str, Any, Meta]]:
    """Every field but the kind of result, replaced by all sorts of things."""
    for field in sorted(meta.keys() - {"content"}):
        for value in OTHERS:
            free = FREE[kind].get(field)
            if value == meta[field] or (free is not None and free(value)):
                continue
            changed = copy.deepcopy(meta)
            if value is MISSING:
                del changed[field]
            else:
                changed[field] = value
            yield field, value, changed


@pytest.mark.parametrize("kind", LOAD)
def test_a_field_that_is_missing_or_of_another_type_is_named(
    kind: str, saved: dict[str, tuple[Tensors, Meta]], tmp_path: Path
) -> None:
    tensors, meta = saved[kind]
    before = [parameter.clone() for parameter in model().parameters()]
    n = 0
    for n, (field, value, changed) in enumerate(fields(kind, meta), start=1):
        folder = tmp_path / str(n)
        save_tensors(folder, tensors, changed)
        message = refusal(kind, folder)
        shown = f"{kind}: {field} = {value!r}: {message}"
        assert str(folder) in message or "the update" in message, shown
        # Where numbers of units or parameters no longer fit, a tensor or a weight is named.
        assert any(word in message for word in (field, "the field", "tensor", "the update")), shown
    assert n > 40
    assert all(torch.equal(a, b) for a, b in zip(before, model().parameters(), strict=True))


def damages(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    yield "missing", None
    yield "int8", tensor.to(torch.int8)
    yield "two dimensions", tensor[None]
    yield "empty", tensor[:0]
    yield "shorter", tensor[:-1]
    yield "scalar", tensor.reshape(-1)[0]
    if tensor.is_floating_point():
        for value in (torch.nan, torch.inf):
            bad = tensor.clone()
            bad.view(-1)[-1] = value
            yield str(value), bad
        yield "complex", tensor.to(torch.complex64)


@pytest.mark.parametrize("kind", LOAD)
def test_a_tensor_that_is_missing_or_not_what_it_must_be_is_named(
    kind: str, saved: dict[str, tuple[Tensors, Meta]], tmp_path: Path
) -> None:
    tensors, meta = saved[kind]
    chosen = list(tensors)[:: max(1, len(tensors) // 12)]
    for key in chosen:
        for how, changed in damages(tensors[key]):
            folder = tmp_path / f"{key.replace('/', '-')}-{how}"
            own = {name: each for name, each in tensors.items() if name != key}
            save_tensors(folder, own if changed is None else {**own, key: changed}, meta)
            message = refusal(kind, folder)
            # Of two that do not fit each other either may be named.
            name = "distances" if kind == "probe" else key.partition("/")[2]
            assert name in message or key in message, f"{kind}: {key} {how}: {message}"


# ------------------------------------------------------------------------- which weights they are


def test_scores_of_two_sets_of_weights_are_not_classified_together() -> None:
    """A model before and after training has one name; its scores are not comparable."""
    one, other = model(), model()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    safety, utility = (
        attribute(own, [tiny_models.collate(tiny_models.rows((9, 5), seed=seed))])
        for seed, own in enumerate((one, other))
    )
    assert safety.weights_hash == weights_hash(one)
    assert utility.weights_hash == weights_hash(other)
    shares = {"scu": 0.1, "ucu": 0.1, "ru": 0.3}
    with pytest.raises(ValueError, match="safety and utility were measured on different weights"):
        classify(safety, utility, **shares)
    classify(safety.scores, utility.scores, **shares)  # as the message says


def test_results_say_which_weights_they_come_from(
    saved: dict[str, tuple[Tensors, Meta]],
) -> None:
    own = weights_hash(model())
    for kind in ("attribution", "groups", "update"):
        assert saved[kind][1]["weights_hash"] == own


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("user/model", "user/model"),
        ("/home/someone/model", "model"),
        ("~/model/", "model"),
        (r"C:\Users\someone\model", "model"),
    ],
)
def test_a_path_of_any_system_is_not_published(name: str, public: str) -> None:
    assert public_name(name) == public


def test_an_interval_from_high_to_low_is_refused() -> None:
    figures = {"ASR": {"rate": 0.5, "interval": [0.9, 0.1]}}
    with pytest.raises(ValueError, match="without it nobody can tell it from chance"):
        result_card("T", "w", base_model="a/b", tags=[], code="", facts={}, figures=figures)
