"""Depth-2 modules of every family, and the algebra of unit sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, build, collate, rows
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel

from ssah.units import (
    FFN,
    Attention,
    Family,
    NotCovered,
    UnitSet,
    check_units,
    families,
    family_of,
    find_modules,
    register_family,
)

HYBRID = ["mlp", "attention", "mlp"]
# What the layers hold, where it is not attention and an FFN in each.
KINDS = {
    "qwen3_next": HYBRID,
    "qwen3_5": HYBRID,
    "olmo_hybrid": HYBRID,
    "gemma3n": ["attention"] + ["mlp"] * 4,
    "gemma4": ["attention"] + ["mlp"] * 4,
    "gemma4_one_projection": ["attention", "mlp", "mlp"],
}
# Query heads that share a value head, where it is not one, or two as `num_key_value_heads` says.
QUERIES = {"falcon": 4, "falcon_new": 2, "gpt_bigcode": 4, "gpt_bigcode_heads": 1}
# Models that normalise over the channels, so that one channel changes all others.
NORMALISED = {
    ("gemma3n", "mlp"),
    ("gemma3n", "attention"),
    ("gemma4", "attention"),
    ("gemma4_one_projection", "attention"),
}


def entering(model: PreTrainedModel, name: str) -> Tensor:
    """The activation entering B, ``[rows, length, n_units]``."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    batch = collate(rows((9, 9)), labels=False)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0].reshape(18, -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_come_in_running_order(name: str) -> None:
    model = build(name)
    found = find_modules(model)
    kinds = [module.kind for module in found.values()]
    assert kinds == KINDS.get(name, ["attention", "mlp"] * 2)
    parameters = dict(model.named_parameters())
    for key, module in found.items():
        assert key == module.name
        assert model.get_submodule(key) is module.down
        assert parameters[module.output.param].shape[module.output.dim] == module.n_units
        assert torch.equal(module.output.index, torch.arange(module.n_units))
        for own in module.inputs:
            assert own.index.dtype == torch.int64
            assert own.index.shape == (module.n_units,)
            assert int(own.index.max()) < parameters[own.param].shape[own.dim]
    order = []
    hooks = [
        m.down.register_forward_pre_hook(lambda _m, _a, key=key: order.append(key))
        for key, m in found.items()
    ]
    with torch.no_grad():
        model(**collate(rows(), labels=False))
    for hook in hooks:
        hook.remove()
    assert order == list(found)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_rows_of_a_unit_make_its_channel_and_no_other(name: str, kind: str) -> None:
    """Zero the rows of A that three units own: exactly the channels that share them go silent."""
    model = build(name)
    module = next(iter(find_modules(model, (kind,)).values()))
    before = entering(model, module.name)
    units = torch.tensor([0, 5, module.n_units - 1])
    parameters = dict(model.named_parameters())
    silent = torch.zeros(module.n_units, dtype=torch.bool)
    with torch.no_grad():
        for own in module.inputs:
            parameters[own.param].index_fill_(own.dim, own.index[units], 0.0)
            silent |= torch.isin(own.index, own.index[units])
    assert before[:, silent].abs().amax(0).min() > 0
    after = entering(model, module.name)
    assert after[:, silent].abs().max() == 0
    if (name, kind) not in NORMALISED:
        assert torch.equal(after[:, ~silent], before[:, ~silent])
    grouped = "num_key_value_heads" in FAMILIES[name]().to_dict()
    shared = QUERIES.get(name, 2 if grouped else 1)
    assert int(silent.sum()) == 3 * (shared if kind == "attention" else 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gated_module_is_its_model_s_own(name: str) -> None:
    model = build(name)
    ffn = family_of(model).ffn
    assert ffn is not None
    for module in find_modules(model, ("mlp",)).values():
        if ffn.module is None:
            assert module.gated is None
            continue
        assert module.gated is not None
        x = torch.randn(3, 48)
        gate, up = module.gated.project(x)
        functions = {"silu": nn.functional.silu, "gelu_tanh": nn.GELU(approximate="tanh")}
        own = module.gated.module(x)
        torch.testing.assert_close(module.down(functions[module.gated.act](gate) * up), own)


def test_an_unknown_activation_is_left_to_the_model() -> None:
    model = build("llama")
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    gated = [module.gated for module in find_modules(model, "mlp").values()]
    assert gated[0] is None
    assert gated[1] is not None


def test_bad_models_are_refused_with_the_way_out() -> None:
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"'bert'.*register_family"):
        find_modules(bert)
    with pytest.raises(TypeError, match="Linear, must be a transformers"):
        find_modules(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"modules is .*moe"):
        find_modules(build("llama"), ("moe",))
    wrapped = build("llama")
    wrapped.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.*Identity"):
        find_modules(wrapped)
    packed = build("llama")
    packed.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(5, 1))
    with pytest.raises(ValueError, match="dequantise"):
        find_modules(packed)


def test_a_model_without_modules_of_a_kind_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    only = Family("layers", None, Attention(down="self_attn.o_proj", value="self_attn.v_proj"))
    monkeypatch.setitem(families.FAMILIES, "llama", only)
    assert len(find_modules(model)) == 2
    with pytest.raises(ValueError, match="no depth-2 modules of kind"):
        find_modules(model, ("mlp",))


def test_a_new_architecture_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr("ssah.units.find.FAMILIES", families.FAMILIES)
    bert = BertModel(
        BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    family = Family(
        layers="encoder.layer",
        ffn=FFN(down="output.dense", up="intermediate.dense"),
        attention=Attention(down="attention.output.dense", value="attention.self.value"),
    )
    register_family("bert", family)
    assert [module.n_units for module in find_modules(bert).values()] == [16, 24]
    with pytest.raises(ValueError, match="already registered"):
        register_family("bert", family)
    register_family("bert", family, replace=True)
    wrong = Family("encoder.layer", FFN(down="output.dense", up="attention.self.value"), None)
    register_family("bert", wrong, replace=True)
    with pytest.raises(ValueError, match="16 outputs, must have 24"):
        find_modules(bert)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (Family("layers", None, None), "at least one"),
        (Family("layers", FFN("d", "u", module="mlp"), None), "needs family.ffn.act"),
        (Family("layers", FFN("d", "u", gate="g", fused=True), None), "must be None"),
        (Family("layers", None, Attention("o", "v", "vkq")), "'vkq'"),  # type: ignore[arg-type]
        (
            Family("l", FFN("d", "u"), None, not_covered=(NotCovered("x", "y", "ffn"),)),  # type: ignore[arg-type]
            "instead of 'ffn'",
        ),
    ],
)
def test_contradicting_families_are_refused(family: Family, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_family("new", family)
    assert "new" not in families.FAMILIES


SIZES = {"a": 5, "b": 3, "c": 1}
unit_sets = st.fixed_dictionaries(
    {name: st.sets(st.integers(0, size - 1)) for name, size in SIZES.items()}
)


@settings(deadline=None, max_examples=60)
@given(unit_sets, unit_sets)
def test_unit_sets_are_sets(left: dict[str, set[int]], right: dict[str, set[int]]) -> None:
    a = UnitSet({name: list(units) for name, units in left.items()}, SIZES)
    b = UnitSet({name: list(units) for name, units in right.items()}, SIZES)
    for ours, name in ((a | b, "union"), (a & b, "intersection"), (a - b, "difference")):
        expected = {key: sorted(getattr(left[key], name)(right[key])) for key in SIZES}
        assert {key: index.tolist() for key, index in ours.items()} == expected
        assert len(ours) == sum(map(len, expected.values()))
        assert ours.fraction == len(ours) / 9
        assert ours.sizes == SIZES
    assert (a == b) == (left == right)
    assert a.complement() | a == UnitSet.random(9, SIZES)
    assert len(a & a.complement()) == 0


def test_unit_set_access() -> None:
    units = UnitSet({"a": [3, 1, 3]}, SIZES)
    assert units["a"].tolist() == [1, 3]
    assert units["a"].dtype == torch.int64
    assert units["b"].tolist() == []
    assert units.mask("a").tolist() == [False, True, False, True, False]
    assert list(units) == ["a", "b", "c"]
    assert dict(units).keys() == SIZES.keys()
    assert "b" in units
    assert "d" not in units
    assert "2 of 9 units" in repr(units)
    assert units | UnitSet({}, {"d": 2}) == UnitSet({"a": [1, 3]}, {**SIZES, "d": 2})


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"a": [5]}, r"'a' run from 5 to 5, must be in \[0, 5\)"),
        ({"a": [-1]}, "'a' run from -1"),
        ({"d": [0]}, "sizes lacks: d"),
        ({"a": torch.tensor([True, False])}, "must be one dimension of integers"),
        ({"a": torch.tensor([0.0])}, "must be one dimension of integers"),
        ({"a": torch.tensor([[0]])}, "2 dimensions"),
    ],
)
def test_bad_unit_sets_are_refused(indices: dict[str, Tensor | list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnitSet(indices, SIZES)


def test_random_unit_sets() -> None:
    like = UnitSet({"a": [0, 1], "c": [0]}, SIZES)
    drawn = UnitSet.random(like, seed=3)
    assert {name: len(index) for name, index in drawn.items()} == {"a": 2, "b": 0, "c": 1}
    assert drawn == UnitSet.random(like, seed=3)
    assert len({tuple(UnitSet.random(like, seed=seed)["a"].tolist()) for seed in range(20)}) > 3
    counted = UnitSet.random(4, SIZES, seed=1)
    assert len(counted) == 4
    assert counted.sizes == SIZES
    with pytest.raises(ValueError, match="must be between 0 and 9"):
        UnitSet.random(10, SIZES)
    with pytest.raises(ValueError, match="sizes is None"):
        UnitSet.random(2)
    with pytest.raises(ValueError, match="too few units in: a"):
        UnitSet.random(like, {"a": 1, "c": 1})


def test_units_of_another_model_are_refused_by_name() -> None:
    model = build("llama")
    down = "model.layers.1.mlp.down_proj"
    assert list(check_units(model, UnitSet({down: [1]}, {down: 72}))) == [down]
    with pytest.raises(ValueError, match=r"lacks: transformer\.h\.0"):
        check_units(model, UnitSet({}, {"transformer.h.0": 3}))
    with pytest.raises(ValueError, match=f"70 units in '{down}', the model has 72"):
        check_units(model, UnitSet({}, {down: 70}))
    with pytest.raises(ValueError, match="differ in the number of units of 'a': 5 and 4"):
        UnitSet({}, SIZES) | UnitSet({}, {"a": 4})
