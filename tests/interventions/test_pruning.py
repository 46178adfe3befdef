"""Pruning is function-equal, compensated, and survives a reload."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ablatable import (
    MODELS,
    SIZE,
    assert_same_bits,
    bits,
    columns,
    gpt2,
    llama,
    logits,
    make,
    some_units,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2LMHeadModel,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from ssah.attribution import Attribution
from ssah.interventions import ablate, prune
from ssah.units import UnitSet, find_modules, model_name, units_hash


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


def test_pruned_outputs_equal_ablated_ones(model: PreTrainedModel) -> None:
    units = some_units(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with ablate(model, units):
        expected = logits(model)
    prune(model, units)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    torch.testing.assert_close(logits(model), expected)


def test_pruning_zeroes_columns_and_rows_and_nothing_else(model: PreTrainedModel) -> None:
    units = some_units(model, 0.6)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in find_modules(expected).items():
            pruned = set(units[name].tolist())
            for j in pruned:
                columns(expected, name)[j] = 0.0
            for rows in module.inputs:
                parameter = expected.get_parameter(rows.param)
                feeds: dict[int, set[int]] = {}
                for unit, entry in enumerate(rows.index.tolist()):
                    feeds.setdefault(entry, set()).add(unit)
                for entry, fed in feeds.items():
                    if fed <= pruned:
                        parameter.select(rows.dim, entry).zero_()
    prune(model, units)
    assert_same_bits(model, bits(expected))


def test_a_shared_value_row_waits_for_all_its_columns() -> None:
    name, sizes = "model.layers.0.self_attn.o_proj", {"model.layers.0.self_attn.o_proj": 16}
    value = "model.layers.0.self_attn.v_proj"
    at_once, in_two_steps = llama(attention_bias=True), llama(attention_bias=True)
    # heads 0 and 1 share the first key/value head: units 2 and 6 share its row 2
    prune(in_two_steps, UnitSet({name: [2]}, sizes))
    assert in_two_steps.get_submodule(value).weight[2].all()
    prune(in_two_steps, UnitSet({name: [6]}, sizes))
    prune(at_once, UnitSet({name: [2, 6]}, sizes))
    assert not at_once.get_submodule(value).weight[2].any()
    assert at_once.get_submodule(value).bias[2] == 0
    assert_same_bits(in_two_steps, bits(at_once))


def test_pruning_inference_tensors() -> None:
    with torch.inference_mode():
        model = llama()
    units = some_units(model)
    prune(model, units)
    for name in units:
        assert not columns(model, name)[units[name]].any()


# --------------------------------------------------------------------------------- compensation


def activations(model: nn.Module) -> dict[str, Tensor]:
    """What enters each B on TOKENS: float64 [tokens, n_units]."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.down.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].double().flatten(0, 1)})
        )
        for name, module in find_modules(model).items()
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return seen


def means_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.mean(0) for name, x in activations(model).items()}


def units_in(model: nn.Module, kind: str) -> UnitSet:
    sizes = {name: m.n_units for name, m in find_modules(model, (kind,)).items()}
    return UnitSet.random(sum(sizes.values()) // 3, sizes, seed=4)


COMPENSATED: dict[str, tuple[Callable[[], PreTrainedModel], str, str | None]] = {
    "llama mlp": (llama, "mlp", "mlp_bias"),
    "llama attention": (llama, "attention", "attention_bias"),
    "llama mlp bf16": (lambda: llama(torch.bfloat16), "mlp", "mlp_bias"),
    "llama tied": (lambda: llama(tie_word_embeddings=True), "mlp", "mlp_bias"),
    "llama with biases": (lambda: llama(mlp_bias=True), "mlp", None),
    "qwen3 attention": (lambda: make(Qwen3Config(**SIZE)), "attention", "attention_bias"),
    "gpt2 mlp": (gpt2, "mlp", None),
    "gpt2 attention": (gpt2, "attention", None),
}


@pytest.mark.parametrize("case", list(COMPENSATED))
def test_compensation_keeps_the_mean_and_survives_a_reload(case: str, tmp_path: Any) -> None:
    build, kind, flag = COMPENSATED[case]
    model = build()
    units, means = units_in(model, kind), means_of(model)
    original = copy.deepcopy(model)
    old_names = {name for name, _ in model.named_parameters()}
    prune(model, units, compensate=True, means=means)

    # loops: B's bias has moved by the mean of what the pruned units put out
    for name in units:
        before = getattr(original.get_submodule(name), "bias", None)
        shift = torch.zeros(16, dtype=torch.float64)
        for j in units[name].tolist():
            shift += means[name][j] * columns(original, name)[j].double()
        expected = shift + (0 if before is None else before.double())
        bias = model.get_submodule(name).bias
        assert bias.dtype == model.dtype
        torch.testing.assert_close(bias, expected.to(model.dtype))

    # the module's mean output on the tokens of the means is as before, its input unchanged
    first = next(name for name in units if len(units[name]))
    x = activations(original)[first].to(model.dtype)
    with torch.no_grad():
        mean_before = original.get_submodule(first)(x).double().mean(0)
        mean_after = model.get_submodule(first)(x).double().mean(0)
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mean_after, mean_before, rtol=tolerance, atol=tolerance)

    # only biases are new, all others are zero, and the configuration says so
    new = [name for name, _ in model.named_parameters() if name not in old_names]
    assert bool(new) == (flag is not None)
    for name in new:
        assert name.endswith(".bias")
        if name.removesuffix(".bias") not in units:
            assert not model.get_parameter(name).any()
    if flag is not None:
        assert getattr(model.config, flag) is True
        assert getattr(original.config, flag) is False

    model.save_pretrained(tmp_path)
    reloaded, info = Auto.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_bits(reloaded.eval(), bits(model))
    assert torch.equal(logits(reloaded), logits(model))


def test_compensation_of_both_kinds_at_once() -> None:
    model, together = llama(), llama()
    mlp, attention, means = units_in(model, "mlp"), units_in(model, "attention"), means_of(model)
    prune(together, mlp | attention, compensate=True, means=means)
    prune(model, mlp, compensate=True, means=means)
    prune(model, attention, compensate=True, means=means)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, together.get_parameter(name))


def test_creating_biases_alone_changes_no_output() -> None:
    model = llama()
    expected = logits(model)
    state = torch.random.get_rng_state()
    units = units_in(model, "mlp")
    zero = {name: torch.zeros(n) for name, n in units.sizes.items()}
    with ablate(model, units):
        expected = logits(model)
    prune(model, units, compensate=True, means=zero)
    torch.testing.assert_close(logits(model), expected)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Qwen2Config, "mlp"),
        (Qwen2Config, "attention"),
        (Phi3Config, "mlp"),
        (Gemma2Config, "mlp"),
        (Qwen3Config, "mlp"),
    ],
)
def test_a_bias_that_no_configuration_expresses_is_refused(config: Any, kind: str) -> None:
    model = make(config(**SIZE))
    before, settings = bits(model), model.config.to_dict()
    units = units_in(model, kind)
    name = next(name for name in units if len(units[name]))
    with pytest.raises(ValueError, match=f"{name} has no bias.*{type(model).__name__}"):
        prune(model, units, compensate=True, means=means_of(model))
    assert_same_bits(model, before)
    assert model.config.to_dict() == settings


def test_unusable_means_are_refused_and_change_nothing() -> None:
    model = llama()
    units, means = units_in(model, "mlp"), means_of(model)
    name = next(name for name in units if len(units[name]))
    unit = int(units[name][0])
    before = bits(model)
    bad = means[name].clone()
    bad[unit] = torch.nan
    for arguments, words in (
        ({"compensate": True}, "means is not given"),
        ({"means": means}, "compensate is False and means is given"),
        ({"compensate": True, "means": {}}, f"means lacks {name}"),
        ({"compensate": True, "means": means | {name: means[name][:3]}}, r"shape \[3\].*\[24\]"),
        ({"compensate": True, "means": means | {name: bad}}, f"means of {name} are NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            prune(model, units, **arguments)  # type: ignore[arg-type]
    assert_same_bits(model, before)


def test_means_of_an_attribution() -> None:
    model, plain = gpt2(), gpt2()
    units, means = units_in(model, "mlp"), means_of(model)
    attribution = Attribution(
        means,
        means,
        means,
        dict.fromkeys(means, 24),
        metric="variance",
        tokens="all",
        model_name=model_name(model),
        units_hash=units_hash(model),
        data_fingerprint="tokens",
    )
    prune(model, units, compensate=True, means=attribution)
    prune(plain, units, compensate=True, means=means)
    assert_same_bits(model, bits(plain))
    other = llama()
    with pytest.raises(ValueError, match="attribution was made on 'GPT2LMHeadModel'"):
        prune(other, units_in(other, "mlp"), compensate=True, means=attribution)


def test_means_of_units_that_stay_are_not_looked_at() -> None:
    model = gpt2()
    units, means = units_in(model, "mlp"), means_of(model)
    for name, mean in means.items():
        if name in units:
            mean[(~units.mask(name)).nonzero()[:, 0]] = torch.nan
    prune(model, units, compensate=True, means=means)
    assert logits(model).isfinite().all()


def test_config_of_gpt2_model_is_untouched() -> None:
    model = gpt2()
    assert isinstance(model, GPT2LMHeadModel)
    settings = model.config.to_dict()
    prune(model, units_in(model, "mlp"), compensate=True, means=means_of(model))
    assert model.config.to_dict() == settings
