"""Routed experts: their units, grouping, ablation, pruning, and what is refused.

`family_checks.py` compares scores, ablation and training of every family.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from mixtures import Capture, activation, column
from scores import ragged
from tiny_models import EXPERTS, build, collate, rows
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    PreTrainedModel,
)

from ssah import ablate, attribute, classify, find_modules, prune
from ssah.attribution import Attribution
from ssah.groups import UnitGroups
from ssah.units import DepthTwoModule, Experts, Family, UnitSet, config_hash, families

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than two:UserWarning")


def experts_of(found: dict[str, DepthTwoModule]) -> dict[str, DepthTwoModule]:
    return {name: module for name, module in found.items() if module.expert is not None}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("metric", ["variance", "taylor"])
def test_left_padding_and_all_tokens(name: str, metric: str) -> None:
    model = build(name, dtype=torch.float64)
    batches = ragged("left", labels=False)
    result = attribute(model, batches, metric=metric)
    Capture(model, batches).check(result)
    routed = [result.count[name] for name in experts_of(find_modules(model))]
    layers = len({module.down for module in experts_of(find_modules(model)).values()})
    assert sum(routed) == 2 * layers * (31 + 29)


def test_routed_padding_never_counts() -> None:
    model = build("qwen3_moe")
    batch = collate(rows(), labels=False)
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)}
    first, second = attribute(model, [batch]), attribute(model, [other])
    assert first.count == second.count
    for name, score in first.scores.items():
        assert torch.equal(score, second.scores[name])


def test_all_experts_count_every_token_and_change_nothing_else() -> None:
    model = build("qwen2_moe", dtype=torch.float64)
    result = attribute(model, ragged(), all_experts=True)
    assert len(set(result.count.values())) == 1
    routed = attribute(model, ragged())
    for b, module in find_modules(model).items():
        if module.expert is None:
            torch.testing.assert_close(result.scores[b], routed.scores[b], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="differ in routing to experts"):
        classify(result, routed, scu=0.1, ucu=0.1, ru=0.1)


def test_all_experts_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ValueError, match=r"all_experts is True.*metric 'taylor'"):
        attribute(build("mixtral"), ragged(), metric="taylor", all_experts=True)
    with pytest.raises(ValueError, match=r"all_experts is True.*without routed experts"):
        attribute(build("llama"), ragged(), all_experts=True)


def test_experts_that_saw_too_few_tokens_are_reported(tmp_path: Path) -> None:
    model = build("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -1e4
    unseen = "model.layers.1.mlp.experts.down_proj[3]"
    with pytest.warns(UserWarning, match=r"1 of 10 modules are experts.*down_proj\[3\]"):
        result = attribute(model, ragged())
    assert result.scarce() == {unseen: 0}
    assert not result.scores[unseen].any()
    assert set(result.scarce(least=1000)) == set(result.count)
    result.save(tmp_path)
    assert Attribution.load(tmp_path, model).scarce() == {unseen: 0}
    classify(result.scores, result.scores, scu=0.1, ucu=0.1, ru=0.1, scope="model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(model, ragged(), all_experts=True)


@pytest.mark.parametrize("name", EXPERTS)
def test_rows_of_a_unit_make_its_channel_and_no_other(name: str) -> None:
    model = build(name)
    found = find_modules(model)
    assert list(found) == list(attribute(model, ragged()).scores)
    module = list(experts_of(found).values())[-1]
    assert module.expert is not None
    assert module.name.endswith(f".experts.down_proj[{module.expert}]")
    x = torch.randn(9, 48)
    units = torch.tensor([0, 5, module.n_units - 1])
    silent = torch.zeros(module.n_units, dtype=torch.bool)
    silent[units] = True
    before = activation(module.down, module.expert, x)
    with torch.no_grad():
        for own in module.inputs:
            own.tensor(model).index_fill_(own.dim, own.index[units], 0.0)
            flat = model.get_parameter(own.param).movedim(own.dim + 1, 1).flatten(0, 1)
            assert not flat[own.entries[units]].any()
    after = activation(module.down, module.expert, x)
    assert before[:, silent].abs().amax(0).min() > 0
    assert not after[:, silent].any()
    assert torch.equal(after[:, ~silent], before[:, ~silent])


def test_values_of_a_latent_attention_make_their_channels() -> None:
    model = build("deepseek_v3")
    module = find_modules(model)["model.layers.0.self_attn.o_proj"]
    assert module.n_units == 40
    with torch.no_grad():
        for own in module.inputs:
            own.tensor(model).index_fill_(own.dim, own.index[13:17], 0.0)
    result = attribute(model, ragged(), metric="norm")
    silent = result.scores[module.name] == 0
    assert silent.nonzero()[:, 0].tolist() == [13, 14, 15, 16]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**collate(rows((9, 9)), labels=False), use_cache=False).logits


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_groups_ablation_and_pruning(name: str, tmp_path: Path) -> None:
    model = build(name)
    safety, utility = attribute(model, ragged()), attribute(model, ragged()[:1])
    groups = classify(safety, utility, scu=0.1, ucu=0.1, ru=0.2)
    groups.save(tmp_path)
    groups = UnitGroups.load(tmp_path, model)
    assert {row["layer"] for row in groups.summary()["modules"]} == {0, 1}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = logits(model)
    with ablate(model, groups["ru"]):
        ablated = logits(model)
        for b, module in find_modules(model).items():
            gone = (column(module) == 0).all(0)
            assert torch.equal(gone.nonzero()[:, 0], groups["ru"][b])
    assert not torch.equal(ablated, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    prune(model, groups["ru"])
    torch.testing.assert_close(logits(model), ablated)
    for b, module in find_modules(model).items():
        for own in module.inputs if module.expert is not None else ():
            rows_of_a = own.tensor(model).index_select(own.dim, own.index[groups["ru"][b]])
            assert not rows_of_a.any()


def test_compensation_goes_to_the_expert_s_bias() -> None:
    model = build("gpt_oss")
    scores = attribute(model, ragged())
    b = "model.layers.0.mlp.experts.down_proj[2]"
    module = find_modules(model)[b]
    units = UnitSet({b: [1, 4]}, {b: module.n_units})
    before, weight = model.model.layers[0].mlp.experts.down_proj_bias.clone(), column(module)
    shift = weight[:, [1, 4]].double() @ scores.mean[b][[1, 4]]
    prune(model, units, compensate=True, means=scores)
    after = model.model.layers[0].mlp.experts.down_proj_bias
    torch.testing.assert_close(after[2], (before[2] + shift).float())
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    other = build("mixtral")
    with pytest.raises(ValueError, match=r"down_proj\[2\] has no bias"):
        prune(other, UnitSet({b: [1]}, {b: 72}), compensate=True, means={b: torch.zeros(72)})


def test_a_model_is_left_as_it_was_and_bfloat16_is_close() -> None:
    model = build("gpt_oss")
    module = next(iter(experts_of(find_modules(model)).values())).down
    before, digest = logits(model), config_hash(model)
    exact = attribute(model, ragged())
    assert "forward" not in vars(module)
    assert torch.equal(logits(model), before)
    model.set_experts_implementation("eager")
    assert config_hash(model) == digest
    close = attribute(build("gpt_oss", dtype=torch.bfloat16), ragged(), modules="mlp")
    a, b = (sum(float(x.scores[name].sum()) for name in close.scores) for x in (exact, close))
    assert abs(a / b - 1) < 0.1


def test_hooks_that_bring_weights_still_run() -> None:
    """accelerate replaces the forward of a module that it moves in and out of memory."""
    model, calls = build("mixtral"), []

    class Bring(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    before = attribute(model, ragged())
    experts = model.model.layers[0].mlp.experts
    add_hook_to_module(experts, Bring())
    after = attribute(model, ragged())
    assert calls == [experts, experts]
    for name, score in before.scores.items():
        assert torch.equal(score, after.scores[name])
    remove_hook_from_module(experts)
    assert torch.equal(logits(model), logits(build("mixtral")))


def test_another_architecture_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Family(
        "layers", None, families.FAMILIES["llama"].attention, experts=Experts("mlp.experts")
    )
    monkeypatch.setitem(families.FAMILIES, "flex_olmo", entry)
    config: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    result = attribute(FlexOlmoForCausalLM(FlexOlmoConfig(**config)), ragged())
    assert len(result.scores) == 4
    with pytest.raises(ValueError, match="no ffn, attention or experts"):
        families.register_family("new", Family("layers", None, None))


def test_a_shared_expert_may_be_left_out_but_not_misnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EXPERTS["ernie4_5_moe"]()
    shared = "model.layers.1.mlp.shared_experts.down_proj"
    assert shared in find_modules(AutoModelForCausalLM.from_config(config))
    config.moe_num_shared_experts = 0
    model = AutoModelForCausalLM.from_config(config)
    found = list(find_modules(model))
    assert shared not in found
    assert list(attribute(model, ragged()).scores) == found
    misnamed = families.FAMILIES["qwen2_moe"]  # its shared expert has another name
    monkeypatch.setitem(families.FAMILIES, "ernie4_5_moe", misnamed)
    with pytest.raises(ValueError, match=r"has no module 'model.layers.1.mlp.shared_expert\."):
        find_modules(model)


def test_experts_of_another_kind_are_refused() -> None:
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match="normalises the output"):
        find_modules(model)
    experts.has_post_expert_norm = False
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="has the experts of one rank"):
        find_modules(model)
    experts._is_expert_parallel = False
    experts.down_proj = nn.Parameter(torch.zeros(4, 7))
    with pytest.raises(ValueError, match="one matrix an expert"):
        find_modules(model)
    model.model.layers[0].mlp.experts = nn.Identity()
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts' is a Identity, must be a class"):
        find_modules(model)
