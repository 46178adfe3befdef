"""Ablation puts every bit back; pruning is function-equal, compensated, and survives a reload."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from ssah.attribution import Attribution
from ssah.interventions import ablate, prune
from ssah.units import UnitSet, find_modules, model_name, units_hash

SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
TOKENS = torch.arange(1, 25).view(2, 12)


def make(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = Auto.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # transformers starts biases at zero
    return model


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    return make(LlamaConfig(**{**SIZE, **options}), dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return make(GPT2Config(n_embd=16, n_inner=24, n_layer=2, n_head=4, vocab_size=40), dtype)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-bf16": lambda: llama(torch.bfloat16),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(mlp_bias=True, attention_bias=True),
    "gpt2": gpt2,
    "gpt2-bf16": lambda: gpt2(torch.bfloat16),
    "phi3": lambda: make(Phi3Config(**SIZE)),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


def some_units(model: nn.Module, share: float = 0.3, seed: int = 0) -> UnitSet:
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    return UnitSet.random(int(share * sum(sizes.values())), sizes, seed)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter as integers, so that -0.0 and NaN payloads count as well."""
    kinds = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    return {
        name: parameter.detach().clone().view(kinds[parameter.element_size()])
        for name, parameter in model.named_parameters()
    }


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = bits(model)
    assert list(after) == list(before)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved == []


def columns(model: nn.Module, name: str) -> Tensor:
    """B's weight with units first."""
    weight = model.get_submodule(name).weight
    return weight.T if isinstance(model.get_submodule(name), nn.Linear) else weight


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


# ------------------------------------------------------------------------------------- ablation


def test_ablation_zeroes_the_columns_and_nothing_else(model: PreTrainedModel) -> None:
    units, before = some_units(model), bits(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name in units:
            for j in units[name].tolist():
                columns(expected, name)[j] = 0.0
    with ablate(model, units) as yielded:
        assert yielded is model
        assert_same_bits(model, bits(expected))
        assert torch.equal(logits(model), logits(expected))
        assert not torch.equal(logits(model), 0 * logits(model))
    assert_same_bits(model, before)


def test_ablated_units_are_what_does_not_pass(model: PreTrainedModel) -> None:
    """Zero columns of B are zero channels of the activation entering B."""
    units = some_units(model)
    expected = copy.deepcopy(model)
    for name in units:
        keep = (~units.mask(name)).to(model.dtype)
        expected.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, keep=keep: (inputs[0] * keep,)
        )
    with ablate(model, units):
        torch.testing.assert_close(logits(model), logits(expected))


def test_ablation_is_undone_after_an_exception(model: PreTrainedModel) -> None:
    before = bits(model)
    with pytest.raises(KeyError, match="inside"), ablate(model, some_units(model)):
        raise KeyError("inside")
    assert_same_bits(model, before)


def test_ablation_is_undone_when_entering_fails() -> None:
    model = llama()
    before = bits(model)
    units = some_units(model)
    context = ablate(model, units)
    last = model.get_submodule(list(units)[-1])
    whole = last.weight.data
    last.weight.data = whole[:, :1]  # too small for the units' indices
    with pytest.raises((RuntimeError, IndexError)), context:
        pass
    last.weight.data = whole
    assert_same_bits(model, before)


def test_nested_and_overlapping_ablations(model: PreTrainedModel) -> None:
    first, second = some_units(model, 0.5, seed=1), some_units(model, 0.5, seed=2)
    assert len(first & second) > 0
    before = bits(model)
    with ablate(model, first | second):
        both = bits(model)
    with ablate(model, first):
        alone = bits(model)
        with ablate(model, second):
            assert_same_bits(model, both)
        assert_same_bits(model, alone)
        with ablate(model, first):
            assert_same_bits(model, alone)
        assert_same_bits(model, alone)
    assert_same_bits(model, before)


def test_special_values_come_back() -> None:
    model = llama(torch.bfloat16)
    weight = model.get_submodule("model.layers.0.mlp.down_proj").weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-0.0, 1e-40, 3e38, -3e38])
        weight.view(torch.int16)[1, :4] = torch.tensor([0x0001, 0x7F7F, -0x8000, 0x0080]).short()
    before = bits(model)
    with ablate(model, some_units(model).complement() | some_units(model)):
        assert not weight.any()
    assert_same_bits(model, before)


def test_parameters_keep_identity_gradients_and_mode() -> None:
    model = llama().train()
    model.model.layers[0].requires_grad_(False)
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    with ablate(model, some_units(model)):
        model(TOKENS, labels=TOKENS).loss.backward()
        assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == flags[name]
        assert (parameter.grad is not None) == flags[name]
    assert model.training


def test_a_pending_backward_pass_notices() -> None:
    model = llama()
    with ablate(model, some_units(model)):
        loss = model(TOKENS, labels=TOKENS).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors() -> None:
    with torch.inference_mode():
        model = llama()
    model.requires_grad_(False)
    assert model.model.layers[0].mlp.down_proj.weight.is_inference()
    before = bits(model)
    with ablate(model, some_units(model)):
        assert not torch.equal(bits(model)["model.layers.0.mlp.down_proj.weight"],
                               before["model.layers.0.mlp.down_proj.weight"])  # fmt: skip
    assert_same_bits(model, before)
    with torch.inference_mode(), ablate(model, some_units(model)):
        logits(model)
    assert_same_bits(model, before)


def test_only_touched_columns_are_kept() -> None:
    model = llama(intermediate_size=4096)
    name = "model.layers.0.mlp.down_proj"
    units = UnitSet({name: [7, 9]}, {name: 4096})
    context = ablate(model, units)
    with context:
        frame = context.gen.gi_frame.f_locals  # type: ignore[attr-defined]
        assert [tuple(values.shape) for _, values in frame["saved"]] == [(16, 2)]


def test_units_of_part_of_the_modules() -> None:
    model = llama()
    before = bits(model)
    name = "model.layers.1.self_attn.o_proj"
    with ablate(model, UnitSet({name: [3]}, {name: 16})):
        changed = [n for n, x in bits(model).items() if not torch.equal(x, before[n])]
        assert changed == [f"{name}.weight"]
    with ablate(model, UnitSet({}, {name: 16})):
        assert_same_bits(model, before)


@pytest.mark.parametrize("take_out", [ablate, prune])
def test_units_of_another_model_are_refused(take_out: Callable[..., Any]) -> None:
    model = llama()
    before = bits(model)
    with pytest.raises(ValueError, match=r"transformer\.h\.0"):
        take_out(model, some_units(gpt2()))
    with pytest.raises(ValueError, match=r"28 units in 'model.layers.0.mlp.down_proj'.* 24"):
        take_out(model, some_units(llama(intermediate_size=28)))
    with pytest.raises(TypeError, match=r"units is dict.*must be a UnitSet"):
        take_out(model, {"scu": some_units(model)})
    assert_same_bits(model, before)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZE))
    with pytest.raises(ValueError, match=r"self_attn.o_proj.weight is .* on meta"):
        ablate(model, some_units(model))


# -------------------------------------------------------------------------------------- pruning


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
