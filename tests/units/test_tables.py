"""Units as rows of a table: written, read again, and made of pairs."""

from __future__ import annotations

import io
from typing import Any

import pandas
import pytest
import torch
from group_scores import attribution, tensors
from tiny_models import EXPERTS, FAMILIES, build, cases

from ssah.groups import classify
from ssah.units import UnitSet, find_modules, layer_names
from ssah.units.places import is_expert, kind_of, layer_of

MLP, ATTENTION = "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"
SIZES = {ATTENTION.format(0): 4, MLP.format(0): 6, ATTENTION.format(10): 4, MLP.format(10): 6}


@pytest.mark.parametrize("name", cases(*FAMILIES, *EXPERTS))
def test_a_name_tells_the_layer_and_the_kind(name: str) -> None:
    model = build(name)
    layers = layer_names(model)
    for each, module in find_modules(model).items():
        assert kind_of(each) == module.kind, each
        assert is_expert(each) == (module.expert is not None)
        assert each.startswith(f"{layers[layer_of(each)]}."), each


def test_a_csv_file_and_back() -> None:
    units = UnitSet({MLP.format(10): [5, 1], ATTENTION.format(0): [3]}, SIZES)
    frame = units.to_frame()
    assert frame.values.tolist() == [
        [ATTENTION.format(0), 0, "attention", 3],
        [MLP.format(10), 10, "mlp", 1],
        [MLP.format(10), 10, "mlp", 5],
    ]
    read = pandas.read_csv(io.StringIO(frame.to_csv(index=False)))
    assert UnitSet.from_pairs(zip(read["module"], read["unit"], strict=True), SIZES) == units
    heads = read[read["kind"] == "attention"]
    pairs = zip(heads["layer"], heads["unit"], strict=True)
    assert UnitSet.from_pairs(pairs, SIZES, kind="attention") == UnitSet(
        {ATTENTION.format(0): [3]}, SIZES
    )
    assert UnitSet({}, {}).to_frame().columns.tolist() == ["module", "layer", "kind", "unit"]


def test_pairs_of_layers_and_of_names() -> None:
    pairs = [(10, 2), (MLP.format(0), 4), (10, torch.tensor(5)), (10, 2)]
    found = UnitSet.from_pairs(pairs, SIZES)  # type: ignore[arg-type]
    assert found == UnitSet({MLP.format(0): [4], MLP.format(10): [2, 5]}, SIZES)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("model.layers.0.mlp", 1), r"pairs\[1\] is .* whose module must be one of sizes"),
        ((3, 1), r"pairs\[1\] is \(3, 1\), whose layer must have a module of kind 'mlp'"),
        ((0, 1.0), r"pairs\[1\] is \(0, 1.0\), must have a whole number in the place of 1.0"),
        ((0, True), "in the place of True"),
        ((None, 1), "in the place of None"),
        ((0, 1, 2), r"pairs\[1\] is \(0, 1, 2\), must be a module's name or a layer's number"),
        ((0, 6), r"run from 1 to 6, must be in \[0, 6\)"),
        ((1, 0), "has a mixture of experts of kind 'mlp': give the module's name"),
    ],
)
def test_a_pair_that_is_none_is_named(pair: Any, message: str) -> None:
    experts = {f"model.layers.1.mlp.experts.down_proj[{i}]": 3 for i in range(2)}
    with pytest.raises(ValueError, match=message):
        UnitSet.from_pairs([(0, 1), pair], SIZES | experts)


def test_scores_and_groups_as_tables() -> None:
    safety = tensors({MLP.format(0): [0.0, 3.0, 1.0], MLP.format(1): [2.0, 5.0]})
    signed = {name: -score for name, score in safety.items()}
    scores = attribution(safety, metric="taylor", signed=signed)
    frame = scores.to_frame()
    for row in frame.itertuples():
        assert row.score == scores.scores[row.module][row.unit]
        assert row.mean == scores.mean[row.module][row.unit]
        assert row.variance == scores.variance[row.module][row.unit]
        assert row.signed == -row.score
        assert row.tokens == 2
    assert len(frame) == 5
    assert "signed" not in attribution(safety).to_frame()

    utility = tensors({MLP.format(0): [4.0, 0.0, 1.0], MLP.format(1): [2.0, 0.5]})
    groups = classify(safety, utility, scu=0.2, ucu=0.2, ru=0.2, normalize="none")
    table = groups.to_frame()
    for group, units in groups.items():
        own = table[table["group"] == group]
        assert (
            UnitSet.from_pairs(zip(own["module"], own["unit"], strict=True), groups.sizes) == units
        )
    assert table["safety"].tolist() == [0, 3, 1, 2, 5]
    assert table["utility"].tolist() == [4, 0, 1, 2, 0.5]
