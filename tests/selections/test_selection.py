"""Selections against Python sets of (parameter, position) that loops over the weights make."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from plans import draw
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ssah
from ssah import selections
from ssah.selections import Selection
from ssah.units import BitMask, UnitSet, find_modules

HEADS, SHARING, WIDTH, HIDDEN, UNITS, LAYERS = 4, 2, 2, 4, 5, 3
Positions = set[tuple[str, tuple[int, ...]]]


@cache
def model() -> PreTrainedModel:
    """Four query heads of two channels over two key/value heads, three layers, an untied head."""
    config = LlamaConfig(
        vocab_size=7,
        hidden_size=HIDDEN,
        intermediate_size=UNITS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // SHARING,
        head_dim=WIDTH,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@cache
def everything() -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset(
        (name, place)
        for name, p in model().named_parameters()
        for place in product(*map(range, p.shape))
    )


def where(condition: Callable[[str, tuple[int, ...]], bool]) -> Positions:
    return {(name, place) for name, place in everything() if condition(name, place)}


def positions(selection: Selection) -> Positions:
    found: Positions = set()
    for name in selection:
        mask = selection.mask(name).expand(model().get_parameter(name).shape)
        found |= {(name, tuple(place)) for place in mask.nonzero().tolist()}
    return found


def of_heads(layer: int, chosen: set[int], shared: str) -> Positions:
    """From the definition: rows of Q, rows of K and V by who shares them, columns of O."""
    start = f"model.layers.{layer}.self_attn."
    groups = [range(g * SHARING, (g + 1) * SHARING) for g in range(HEADS // SHARING)]
    meant = [(all if shared == "all" else any)(h in chosen for h in group) for group in groups]

    def has(name: str, place: tuple[int, ...]) -> bool:
        if name == f"{start}q_proj.weight":
            return place[0] // WIDTH in chosen
        if name == f"{start}o_proj.weight":
            return place[1] // WIDTH in chosen
        return (
            name in (f"{start}k_proj.weight", f"{start}v_proj.weight") and meant[place[0] // WIDTH]
        )

    return where(has)


def of_units(units: UnitSet, shared: str) -> Positions:
    """From the definition: unit by unit, and by who shares its row of V."""
    owners: dict[tuple[str, int, int], list[bool]] = {}
    for name, module in find_modules(model()).items():
        chosen = set(units[name].tolist())
        for owned in (*module.inputs, module.output):
            for unit, entry in enumerate(owned.index.tolist()):
                owners.setdefault((owned.param, owned.dim, entry), []).append(unit in chosen)
    decide = all if shared == "all" else any
    meant = {key for key, own in owners.items() if decide(own)}
    dims = {param: dim for param, dim, _ in owners}
    return where(
        lambda name, place: name in dims and (name, dims[name], place[dims[name]]) in meant
    )


@st.composite
def parts(draw_one: st.DrawFn) -> tuple[Selection, Positions]:
    """A selection of one kind, and its positions."""
    kind = draw_one(st.sampled_from(["heads", "kv", "layers", "parameters", "rows", "weights"]))
    layer, shared = draw_one(st.integers(0, LAYERS - 1)), draw_one(st.sampled_from(["all", "any"]))
    if kind == "heads":
        own = draw_one(st.sets(st.integers(0, HEADS - 1), min_size=1))
        found = selections.heads(model(), {layer: own}, shared=shared)
        return found, of_heads(layer, own, shared)
    if kind == "kv":
        group = draw_one(st.integers(0, HEADS // SHARING - 1))
        own = set(range(group * SHARING, (group + 1) * SHARING))
        found = selections.heads(model(), {layer: [group]}, kv_heads=True, shared=shared)
        return found, of_heads(layer, own, "all")
    if kind == "layers":
        found = selections.layers(model(), [layer])
        return found, where(lambda name, _: name.startswith(f"model.layers.{layer}."))
    if kind == "parameters":
        return selections.parameters(model(), ["*norm*"]), where(lambda name, _: "norm" in name)
    if kind == "rows":
        name, rows = "lm_head.weight", draw_one(st.sets(st.integers(0, 6), min_size=1))
        found = selections.rows(model(), {name: sorted(rows)})
        return found, where(lambda own, place: own == name and place[0] in rows)
    name = f"model.layers.{layer}." + draw_one(
        st.sampled_from(["self_attn.o_proj.weight", "mlp.up_proj.weight"])
    )
    shape = model().get_parameter(name).shape
    bits = draw_one(st.lists(st.booleans(), min_size=shape.numel(), max_size=shape.numel()))
    mask = torch.tensor(bits).view(shape)
    found = selections.weights(model(), {name: BitMask.of(mask)})
    return found, {(name, tuple(place)) for place in mask.nonzero().tolist()}


@settings(max_examples=25, deadline=None)
@given(parts(), parts(), parts())
def test_the_algebra_is_that_of_sets(first: Any, second: Any, third: Any) -> None:
    (a, of_a), (b, of_b), (c, of_c) = first, second, third
    total = everything()
    for found, expected in (
        (a, of_a),
        (a | b, of_a | of_b),
        (a & b, of_a & of_b),
        (a - b, of_a - of_b),
        (~a, total - of_a),
        ((a | b) - c, (of_a | of_b) - of_c),
        (~(a & b) - c, total - (of_a & of_b) - of_c),
    ):
        assert positions(found) == expected
        assert len(found) == len(expected)
        assert bool(found) == bool(expected)
        assert found.fraction == len(expected) / len(total)
    assert (a == b) == (of_a == of_b)
    assert ~(~a | ~b) == a & b  # equal however they were made
    assert (a | b) - (a - b) == b
    assert a.complement() == ~a


@given(st.floats(0.1, 0.9), st.integers(0, 99), st.sampled_from(["all", "any"]))
@settings(max_examples=8, deadline=None)
def test_units_are_a_selection_and_stand_on_either_side(
    share: float, seed: int, shared: Any
) -> None:
    units = draw(model(), share, seed)
    assert positions(selections.units(model(), units, shared=shared)) == of_units(units, shared)
    owned = of_units(units, "all")
    norms, of_norms = selections.parameters(model(), ["model.layers.1.*"]), None
    of_norms = where(lambda name, _: name.startswith("model.layers.1."))
    assert positions(norms | units) == positions(units | norms) == of_norms | owned
    assert positions(norms & units) == positions(units & norms) == of_norms & owned
    assert positions(norms - units) == of_norms - owned
    assert positions(units - norms) == owned - of_norms
    # What must stay by "any" leaves what may train by "all".
    kept = selections.units(model(), units, shared="any")
    trained = selections.units(model(), units.complement(), shared="all")
    own = selections.units(model(), units | units.complement())
    assert own - kept == trained
    assert (~units) == units.complement()


def test_a_mask_takes_no_more_than_what_is_chosen() -> None:
    chosen = ssah.select(model(), "heads:0.1 + layers:2")
    sizes = {name: mask.bits.numel() for name, mask in chosen._masks.items()}
    assert sizes["model.layers.0.self_attn.q_proj.weight"] == 1  # 8 rows
    assert {sizes[name] for name in chosen.whole} == {1}
    # Rows and columns of one weight are neither: a bit for each entry.
    crossed = chosen | selections.rows(model(), {"model.layers.0.self_attn.o_proj.weight": [1]})
    assert crossed["model.layers.0.self_attn.o_proj.weight"].shape == (HIDDEN, HEADS * WIDTH)


def test_a_random_selection_has_as_many_things_of_each_module() -> None:
    big = tiny_models.build("llama")
    units = draw(big, 0.2)
    like = ssah.select(big, "heads:0.1-2 + kv_heads:1.0") | units
    drawn = [Selection.random(like, seed=seed) for seed in range(4)]
    assert drawn[0] == Selection.random(like, seed=0)
    assert drawn[0] != drawn[1]
    own = ssah.select(big, units)
    for seed in range(4):
        # Units are drawn as `UnitSet.random` draws them.
        other = Selection.random(own, seed=seed)
        assert other == ssah.select(big, UnitSet.random(units, seed=seed))
    layers = selections.layers(model(), [1, 2])
    picked = {positions_of_layers(Selection.random(layers, seed=seed)) for seed in range(20)}
    assert picked == {(0, 1), (0, 2), (1, 2)}
    heads = selections.heads(model(), {0: [3], 2: [0, 1]})
    for seed in range(5):
        found, rest = Selection.random(heads, seed=seed).things()
        assert not rest
        things = found[("heads", "all")]
        assert [len(things[name]) for name in things] == [1, 0, 2]
    groups = selections.heads(model(), {1: [1]}, kv_heads=True)
    of_groups = {0: of_heads(1, {0, 1}, "all"), 1: of_heads(1, {2, 3}, "all")}
    picked = [positions(Selection.random(groups, seed=seed)) for seed in range(8)]
    assert all(each in of_groups.values() for each in picked)
    assert of_groups[0] in picked


def positions_of_layers(selection: Selection) -> tuple[int, ...]:
    found = [n for n in range(LAYERS) if len(selection.within(f"model.layers.{n}."))]
    assert selection == selections.layers(model(), found)
    return tuple(found)


def test_a_random_selection_of_weights_rows_and_parameters() -> None:
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    mask = torch.rand(UNITS, HIDDEN, generator=torch.Generator().manual_seed(3)) < 0.4
    like = selections.weights(model(), {name: BitMask.of(mask), other: BitMask.of(mask)})
    like = like | selections.rows(model(), {"lm_head.weight": [0, 2]})
    drawn = Selection.random(like, seed=1)
    assert drawn.counts == like.counts
    assert drawn["lm_head.weight"].shape == (7, 1)  # whole rows again
    assert drawn != like
    # Two parameters of one size have draws of their own.
    assert drawn[name] != drawn[other]
    norm = selections.parameters(model(), ["model.norm.weight"])
    picked = {Selection.random(norm, seed=seed).whole for seed in range(30)}
    assert {len(each) for each in picked} == {1}
    # One of as many numbers, and there is no other vector of that size but norms.
    assert {each for (each,) in picked} <= {n for n in model().state_dict() if "norm" in n}
    assert len(picked) > 3


def test_things_are_told_and_what_is_left_is_too() -> None:
    chosen = ssah.select(model(), "layers:1 + heads:0.1,1.2 + parameters:model.norm.weight")
    found, rest = chosen.things()
    assert not rest
    assert found["layers", "all"]["model.layers"].tolist() == [1]
    heads = found["heads", "all"]  # head 1.2 lies in layer 1, which is there as a whole
    assert [each.tolist() for _, each in heads.items()] == [[1], [], []]
    _, rest = (chosen - selections.rows(model(), {"model.norm.weight": [0]})).things()
    assert positions(rest) == where(lambda name, at: name == "model.norm.weight" and at != (0,))


def test_a_saved_selection_is_the_same_and_refuses_another_model(tmp_path: Path) -> None:
    chosen = ssah.select(model(), "layers:1 + heads:0.1") | draw(model(), 0.2)
    chosen.save(tmp_path / "chosen")
    alone = Selection.load(tmp_path / "chosen")
    assert alone == chosen
    assert alone.made_of == chosen.made_of
    with pytest.raises(ValueError, match="load the selection with model="):
        Selection.random(alone)
    twin = copy.deepcopy(model())
    again = Selection.load(tmp_path / "chosen", twin)
    assert Selection.random(again, seed=2) == Selection.random(chosen, seed=2)
    assert ssah.select(twin, f"weights:{tmp_path / 'chosen'}") == chosen
    twin.resize_token_embeddings(9)
    for use in (lambda: Selection.load(tmp_path / "chosen", twin), lambda: chosen.of(twin)):
        with pytest.raises(
            ValueError, match=r"'model.embed_tokens.weight' is \[7, 4\] in .* and \[9, 4\] in"
        ):
            use()
    with pytest.raises(ValueError, match="must be of the same model"):
        _ = chosen | ssah.select(twin, "layers:0")
    with pytest.raises(ValueError, match=r"embed_tokens.* no parameter of .*GPT2"):
        chosen.of(tiny_models.build("gpt2"))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    from ssah.storage import load_tensors, save_tensors

    ssah.select(model(), "heads:0.1").save(tmp_path)
    tensors, meta = load_tensors(tmp_path)
    for change, message in (
        ({"shapes": {**meta["shapes"], "model.norm.weight": [5]}}, "not those of its fingerprint"),
        ({"made_of": [["heads", "some"]]}, "the field 'made_of'"),
        ({"masks": {"model.norm.weight": [2]}}, r"the mask of 'model.norm.weight' has the shape"),
        ({"content": "scores"}, "must hold 'ssah selection'"),
    ):
        other = tmp_path / message[:9].replace(" ", "_")
        save_tensors(other, tensors, {**meta, **change})
        with pytest.raises(ValueError, match=message):
            Selection.load(other)
    assert json.loads((tmp_path / "meta.json").read_text())["content"] == "ssah selection"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: selections.heads(model(), {3: [0]}),
            "heads are of layer 3, which has none; .*0 to",
        ),
        (lambda: selections.heads(model(), {0: [4]}), "query heads of layer 0 are 4, .* 0 to 3"),
        (lambda: selections.heads(model(), {0: [2]}, kv_heads=True), "key/value heads .* 0 to 1"),
        (lambda: selections.heads(model(), {0: []}), "query heads of layer 0 are none"),
        (lambda: selections.layers(model(), [3]), "layers are 3, must be .* from 0 to 2"),
        (lambda: selections.layers(model(), [1.5]), "cannot be interpreted as an integer"),
        (lambda: selections.parameters(model(), ["norm"]), "names that the model lacks: norm"),
        (lambda: selections.rows(model(), {"lm_head.weight": [7]}), "rows has 7 for .* 0 to 6"),
        (lambda: selections.weights(model(), {"x": BitMask.of(torch.ones(1) > 0)}), "lacks: x"),
        (
            lambda: selections.weights(
                model(), {"model.norm.weight": BitMask.of(torch.ones(5) > 0)}
            ),
            r"shape \[5\] for 'model.norm.weight', must have \[4\]",
        ),
        (
            lambda: selections.weights(model(), {"model.norm.weight": torch.ones(4) > 0}),
            "weights has a Tensor for .*, must be a BitMask",
        ),
        (lambda: selections.heads(model(), {0: [1]}, shared="some"), "shared is 'some', must be"),
        (lambda: ssah.select(model(), 3), "'int' object is not iterable|what has"),
        (lambda: ssah.select(model(), [3]), "what has a int, must be a UnitSet"),
        (lambda: ssah.select(model(), []), "the selection is empty"),
        (lambda: ssah.select(model(), "layers:0 - layers:0"), "has no weight of the model"),
        (lambda: ssah.select(model(), "scu"), "'scu' and groups are not given"),
        (lambda: ssah.select(model(), "layers:2-1"), "has '2-1'; the first must not be behind"),
        (lambda: ssah.select(model(), "weights:nowhere"), "nothing was saved there"),
        *[
            (
                lambda text=text: ssah.select(model(), text),
                "the selection has .*; it must be one of",
            )
            for text in ("layer:3", "layers:", "layers:x", "heads:3", "heads:1.x", "rows:lm_head")
        ],
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        wrong()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers:0,2", lambda m: selections.layers(m, [0, 2])),
        ("layers:1-2", lambda m: selections.layers(m, [1, 2])),
        ("heads:0.1,2.0-2", lambda m: selections.heads(m, {0: [1], 2: [0, 1, 2]})),
        ("kv_heads:1.0", lambda m: selections.heads(m, {1: [0]}, kv_heads=True)),
        (
            "parameters:model.norm*, lm_head.weight",
            lambda m: selections.parameters(m, ["model.norm.weight", "lm_head.weight"]),
        ),
        ("rows:lm_head.weight=1,3-4", lambda m: selections.rows(m, {"lm_head.weight": [1, 3, 4]})),
        (
            "layers:0-1 - layers:1 + parameters:model.norm.weight",
            lambda m: selections.layers(m, [0]) | selections.parameters(m, ["model.norm.weight"]),
        ),
        (["layers:0", "layers:2"], lambda m: selections.layers(m, [0, 2])),
    ],
)
def test_text_means_what_the_functions_make(text: Any, expected: Any) -> None:
    assert ssah.select(model(), text) == expected(model())


def test_groups_are_units_and_stay_so_where_they_stand_alone() -> None:
    sizes = {name: module.n_units for name, module in find_modules(model()).items()}
    generator = torch.Generator().manual_seed(5)
    safety, utility = (
        {name: torch.rand(n, generator=generator, dtype=torch.float64) for name, n in sizes.items()}
        for _ in range(2)
    )
    groups = ssah.classify(safety, utility, scu=0.2, ucu=0.1, ru=0.3)
    top = groups.top("cu", 0.1, by="group")
    assert selections.named(model(), ["scu", "cu:0.1"], groups, shared="any") == groups["scu"] | top
    assert selections.named(model(), ["cu - cu:0.1"], groups, shared="any") == groups["cu"] - top
    for shared in ("all", "any"):
        found = ssah.select(model(), "layers:1 + scu", groups=groups, shared=shared)
        owned = of_units(groups["scu"], shared)
        assert positions(found) == owned | where(lambda n, _: n.startswith("model.layers.1."))
    with pytest.raises(ValueError, match="must be groups alone"):
        selections.select_units(["layers:1"], groups)
