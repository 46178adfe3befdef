"""Interventions against models that were changed for good, and against hooks written out here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ablatable import assert_same_bits, bits, some_units
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build, collate, rows
from torch import Tensor
from transformers import PreTrainedModel

from ssah import intervene
from ssah.interventions import (
    Add,
    ProjectOut,
    Replace,
    ReplaceHidden,
    Scale,
    ScaleHidden,
    Zero,
    check_not_ablated,
    prune,
)
from ssah.units import layers_path

NAMES = ["llama", "gpt2", "mixtral", "gemma3"]
HIDDEN = 48


def double(name: str) -> PreTrainedModel:
    return build(name, dtype=torch.float64)


def batch(side: str = "left", lengths: tuple[int, ...] = (9, 4, 7)) -> dict[str, Tensor]:
    return collate(rows(lengths), side=side, labels=False)


def logits(model: PreTrainedModel, side: str = "left") -> Tensor:
    with torch.no_grad():
        return model(**batch(side)).logits


def vector(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (HIDDEN,)), generator=torch.Generator().manual_seed(seed))


def hooked(
    model: PreTrainedModel, layer: int, function: Callable[[Tensor], Tensor], data: dict[str, Any]
) -> Tensor:
    """Logits with a plain hook: the specification of a change."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    module = model.get_submodule(f"{layers_path(model)}.{layer}")
    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(**data).logits
    finally:
        handle.remove()


def columns(model: PreTrainedModel, name: str) -> Tensor:
    """B's columns, units first, as a view; of an expert by its number."""
    weight, _, expert = name.partition("[")
    whole = model.get_parameter(weight if expert else f"{name}.weight").detach()
    if expert:
        return whole[int(expert[:-1])].T  # Mixtral's: [experts, hidden, units]
    return whole if "c_proj" in name else whole.T  # GPT-2's Conv1D: [units, hidden]


@pytest.mark.parametrize("name", NAMES)
def test_units_are_changed_as_in_a_copy(name: str) -> None:
    model, other = double(name), build(name, dtype=torch.float64, seed=1)
    units, before = some_units(model), bits(model)
    plain: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "zero": lambda own, _: torch.zeros_like(own),
        "scale": lambda own, _: own * -1.5,
        "replace": lambda _, others: others,
    }
    changes = {
        "zero": Zero(units),
        "scale": Scale(units, -1.5),
        "replace": Replace(units, other.state_dict()),
    }
    for kind, change in changes.items():
        expected = copy.deepcopy(model)
        with torch.no_grad():
            for module in units:
                own, others, new = (columns(each, module) for each in (model, other, expected))
                for j in units[module].tolist():
                    new[j] = plain[kind](own[j], others[j])
        with intervene(model, change) as yielded:
            assert yielded is model
            assert_same_bits(model, bits(expected))
            assert torch.equal(logits(model), logits(expected))
        assert_same_bits(model, before)


def test_whole_parameters_are_changed_by_name() -> None:
    model = build("llama_tied")
    names, before = ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"], bits(model)
    other = {name: torch.full_like(model.get_parameter(name), 0.5) for name in names}
    with intervene(model, Scale(names, 3.0)):
        for name in names:
            assert torch.equal(model.get_parameter(name), 3 * before[name].view(torch.float32))
        with intervene(model, Replace(names[0], other)):
            assert (model.model.norm.weight == 0.5).all()
        with intervene(model, Zero(names)):
            assert not any(model.get_parameter(name).any() for name in names)
    assert_same_bits(model, before)
    # Two names of one tied parameter: it is scaled once.
    with intervene(model, Scale(["lm_head.weight", "model.embed_tokens.weight"], 2.0)):
        tied = before["model.embed_tokens.weight"].view(torch.float32)
        assert torch.equal(model.lm_head.weight, 2 * tied)
    assert_same_bits(model, before)


def test_changes_of_one_block_follow_their_order() -> None:
    model = build("llama")
    units, before = some_units(model), bits(model)
    values = build("llama", seed=1).state_dict()
    with intervene(model, Scale(units, 2.0), Replace(units, values), Scale(units, 0.5)):
        name = "model.layers.0.mlp.down_proj"
        j = units[name]
        own = model.get_parameter(f"{name}.weight")
        assert torch.equal(own[:, j], values[f"{name}.weight"][:, j] * 0.5)
    assert_same_bits(model, before)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_changed_as_by_a_hook(name: str) -> None:
    model, before = double(name), bits(double(name))
    v = vector().double()
    unit = v / v.norm()
    functions: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
        (Add(0, v), lambda h: h + v),
        (ProjectOut(0, 3 * v), lambda h: h - (h * unit).sum(-1, keepdim=True) * unit),
        (ScaleHidden(0, 0.25), lambda h: h / 4),
        (ReplaceHidden(0, v), lambda h: h * 0 + v),
    ]
    plain = logits(model)
    for change, function in functions:
        expected = hooked(model, 0, function, batch())
        with intervene(model, change):
            got = logits(model)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(got, plain)
    assert torch.equal(logits(model), plain)
    assert_same_bits(model, before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("at", "chosen"),
    [
        ("last", lambda number, length: number == length - 1),
        (5, lambda number, _: number >= 5),
        (torch.tensor([8, 1, 3]), None),
        ("generated", lambda *_: False),
    ],
)
def test_positions_count_without_padding(side: str, at: Any, chosen: Any) -> None:
    model, v, data = double("llama"), vector().double(), batch(side)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row in range(3):
        length = int(data["attention_mask"][row].sum())
        start = 9 - length if side == "left" else 0
        for number in range(length):
            wanted = number >= int(at[row]) if chosen is None else chosen(number, length)
            mask[row, start + number] = wanted
    expected = hooked(model, 1, lambda h: torch.where(mask[..., None], h + v, h), data)
    with intervene(model, Add(1, v, at=at)):
        assert torch.equal(logits(model, side), expected)


def test_rows_take_part_or_in_part() -> None:
    model, v = double("llama"), vector().double()
    strengths = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64)
    expected = hooked(model, 0, lambda h: h + strengths[:, None, None] * v, batch())
    with intervene(model, Add(0, v, rows=strengths)):
        torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    plain = logits(model)
    with intervene(model, Add(0, v, rows=torch.tensor([True, False, False]))):
        got = logits(model)
    with intervene(model, Add(0, v)):
        assert torch.equal(got[0], logits(model)[0])
    assert torch.equal(got[1:], plain[1:])


def test_layers_may_have_vectors_of_their_own() -> None:
    model, vs = double("gpt2"), vector(2, HIDDEN).double()
    with intervene(model, Add([1, 0], vs)):
        got = logits(model)
    with intervene(model, Add(1, vs[0]), Add(0, vs[1])):
        assert torch.equal(logits(model), got)


def test_hidden_states_of_a_second_model() -> None:
    """A layer's output of another model makes the rest of this one what the other's would be."""
    model, other = double("llama"), build("llama", dtype=torch.float64, seed=1)
    with torch.no_grad():
        states = other(**batch(), output_hidden_states=True).hidden_states
    with intervene(model, ReplaceHidden(0, states[1][None])):
        got = logits(model)
    expected = copy.deepcopy(model)
    expected.model.embed_tokens, expected.model.layers[0] = (
        other.model.embed_tokens,
        other.model.layers[0],
    )
    attended = batch()["attention_mask"].bool()
    torch.testing.assert_close(got[attended], logits(expected)[attended])


def test_recorded_hidden_states_are_the_changed_ones() -> None:
    model, v = double("llama"), vector().double()
    with torch.no_grad():
        plain = model(**batch(), output_hidden_states=True).hidden_states[1]
        with intervene(model, Add(0, v)):
            recorded = model(**batch(), output_hidden_states=True).hidden_states[1]
    assert torch.equal(recorded, plain + v)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", ["last", "generated", 6])
def test_generation_with_a_cache_equals_whole_passes(name: str, at: Any) -> None:
    """Steps with a cache give what passes over all tokens give, with a hook on the same tokens."""
    model, v, data = double(name), 2 * vector().double(), batch()
    with intervene(model, Add(0, v, at=at)):
        out = model.generate(
            **data, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    width = data["input_ids"].shape[1]
    ids = out.sequences[:, :-1]  # the last one is never computed with
    attended = torch.cat([data["attention_mask"], torch.ones(3, 3, dtype=torch.int64)], 1)
    column = torch.arange(ids.shape[1])
    number = attended.cumsum(1) - 1
    mask = {
        "last": (column == width - 1).expand(3, -1),
        "generated": (column >= width).expand(3, -1),
        6: (number >= 6) & (attended == 1),
    }[at]
    positions = number.clamp(min=0)
    everything = {"input_ids": ids, "attention_mask": attended, "position_ids": positions}
    full = hooked(model, 0, lambda h: torch.where(mask[..., None], h + v, h), everything)
    torch.testing.assert_close(torch.stack(out.logits, 1), full[:, width - 1 :].to(out.logits[0]))


@given(
    plan=st.lists(
        st.tuples(st.sampled_from(["zero", "scale", "replace", "add"]), st.integers(0, 3)),
        min_size=1,
        max_size=5,
    ),
    fails=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_nested_interventions_are_undone_in_turn(plan: list[tuple[str, int]], fails: bool) -> None:
    model = _NESTED
    other = {name: p + 1 for name, p in model.named_parameters()}
    makers: dict[str, Callable[[int], Any]] = {
        "zero": lambda seed: Zero(some_units(model, 0.4, seed)),
        "scale": lambda seed: Scale(some_units(model, 0.4, seed), 0.3 + seed),
        "replace": lambda seed: Replace(some_units(model, 0.4, seed), other),
        "add": lambda seed: Add(seed % 2, vector(seed=seed), at="last"),
    }

    def enter(left: list[tuple[str, int]]) -> None:
        before = bits(model)
        kind, seed = left[0]
        context = intervene(model, makers[kind](seed))
        try:
            with context, context:  # one object, inside itself
                if left[1:]:
                    enter(left[1:])
                elif fails:
                    raise KeyError("inside")
        finally:
            assert_same_bits(model, before)

    plain = logits(model)
    if fails:
        with pytest.raises(KeyError, match="inside"):
            enter(plan)
    else:
        enter(plan)
    assert torch.equal(logits(model), plain)
    check_not_ablated(model, "to be tested")


_NESTED = build("llama", dtype=torch.bfloat16)


def test_inner_changes_come_after_outer_ones() -> None:
    model, v = double("llama"), vector().double()
    with intervene(model, Add(0, v), ScaleHidden(0, 2.0)):
        expected = logits(model)
    outer, inner = intervene(model, Add(0, v)), intervene(model, ScaleHidden(0, 2.0))
    with outer, inner:
        assert torch.equal(logits(model), expected)
    with inner, outer:
        assert not torch.allclose(logits(model), expected)


def test_a_copy_made_inside_is_an_ordinary_model() -> None:
    model = double("llama")
    plain = logits(model)
    with intervene(model, Add(0, vector(), at="last")):
        inside = copy.deepcopy(model)
        assert torch.equal(logits(inside), plain)
        assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(inside), plain)


def test_bfloat16_is_rounded_once() -> None:
    model, v = build("llama", dtype=torch.bfloat16), vector()
    with torch.no_grad():
        plain = model(**batch(), output_hidden_states=True).hidden_states[1]
        with intervene(model, Add(0, v)):
            changed = model(**batch(), output_hidden_states=True).hidden_states[1]
    assert torch.equal(changed, (plain.float() + v).bfloat16())
    assert changed.dtype == torch.bfloat16


def test_computed_weights_are_scaled_at_their_channels() -> None:
    """A weight that its module makes anew holds no change: what enters it does."""
    model = double("llama")
    units = some_units(model)
    with intervene(model, Scale(units, -0.5)):
        expected = logits(model)
    for name in units:
        torch.nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    plain = logits(model)
    with intervene(model, Scale(units, -0.5)):
        torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="must be a plain weight in memory to be replaced"):
        intervene(model, Replace(units, model.state_dict()))
    with pytest.raises(ValueError, match=r"down_proj.weight', which is no parameter"):
        intervene(model, Zero("model.layers.0.mlp.down_proj.weight"))


def test_weights_changed_for_a_while_are_not_made_permanent() -> None:
    model = build("llama")
    units = some_units(model)
    with (
        intervene(model, Scale("model.norm.weight", 2.0)),
        pytest.raises(ValueError, match=r"inside `with ssah\.intervene.*model\.norm"),
    ):
        prune(model, units)
    with intervene(model, Add(0, vector())):
        check_not_ablated(model, "to be trained")  # its weights are its own


REFUSED: list[tuple[Callable[[PreTrainedModel], Any], type[Exception], str]] = [
    (lambda m: Zero("model.norm"), ValueError, "'model.norm', which is no parameter"),
    (lambda m: Zero(3), TypeError, "selection is int; it must be a UnitSet"),  # type: ignore[arg-type]
    (lambda m: Replace("model.norm.weight", {}), ValueError, "values lacks model.norm.weight"),
    (
        lambda m: Replace("model.norm.weight", {"model.norm.weight": torch.ones(2)}),
        ValueError,
        r"float32 \[2\]; it must be .* \[48\]",
    ),
    (
        lambda m: Replace("model.norm.weight", {"model.norm.weight": torch.full((48,), torch.nan)}),
        FloatingPointError,
        "values of model.norm.weight are NaN",
    ),
    (lambda m: Scale("model.norm.weight", float("inf")), ValueError, "factor is inf"),
    (lambda m: Add(2, vector()), ValueError, r"layers is \[2\]; .* from 0 to 1"),
    (lambda m: Add([0, 0], vector()), ValueError, "must be different numbers"),
    (lambda m: Add(0, vector(5)), ValueError, r"vector is torch.float32 \[5\]; .*\[48\]"),
    (lambda m: Add(0, [1.0]), TypeError, "vector is list"),  # type: ignore[arg-type]
    (lambda m: Add(0, vector() / 0), ValueError, "vector is NaN or infinite"),
    (lambda m: ProjectOut(0, torch.zeros(48)), ValueError, "direction is zero"),
    (lambda m: ScaleHidden(0, float("nan")), ValueError, "factor is nan"),
    (lambda m: Add(0, vector(), at="first"), ValueError, "at is 'first'"),  # type: ignore[arg-type]
    (lambda m: Add(0, vector(), at=-1), ValueError, "at is -1"),
    (lambda m: Add(0, vector(), rows=torch.ones(2, 2)), ValueError, r"rows is .*\[2, 2\]"),
    (lambda m: "scu", TypeError, "changes has a str"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_what_cannot_be_right_is_refused_before_anything(
    make: Callable[[PreTrainedModel], Any], error: type[Exception], message: str
) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        intervene(model, Zero("model.norm.weight"), make(model))
    assert model.model.norm.weight.all()


def test_passes_that_do_not_fit_are_refused() -> None:
    model, data = build("llama"), batch()
    wrong = [
        (Add(0, vector(), rows=[True, False]), {}, "rows has 2 rows, the batch 3"),
        (Add(0, vector(), at=[1, 2]), {}, "at has 2 positions, the batch 3"),
        (Add(0, vector(), at="generated"), {"use_cache": False}, "use_cache must be True"),
        (ReplaceHidden(0, vector(1, 3, 8, HIDDEN)), {}, "values are .* a layer"),
        (
            Add(0, vector(), at="last"),
            {"attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)},
            r"attention_mask is \[3, 1, 9, 9\]",
        ),
    ]
    plain = logits(model)
    for change, options, message in wrong:
        with pytest.raises(ValueError, match=message), intervene(model, change), torch.no_grad():
            model(**{**data, **options})
    assert torch.equal(logits(model), plain)
    altup = build("gemma3n")  # its residual stream is of several states a token
    with (
        pytest.raises(ValueError, match=r"puts out \[2, 3, 9, 48\]"),
        intervene(altup, Add(0, vector())),
    ):
        logits(altup)
    model.gradient_checkpointing_enable()
    with (
        pytest.raises(ValueError, match="gradient checkpointing"),
        intervene(model.train(), Add(0, vector(), at="last")),
    ):
        model(**data)
