"""Quantised models are scored and ablated as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bnb_layouts
import pytest
import torch
from packed_models import (
    FOUR_BIT,
    LAID_OUT,
    ROUNDED,
    ROUNDING,
    SCHEMES,
    Build,
    passing,
    stands_for,
    weights_of,
)
from plans import batch, draw
from scores import TOLERANCE, assert_close, expected, ragged
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ssah
from ssah.attribution import METRICS, attribute
from ssah.interventions import Replace, Scale, Zero
from ssah.models import dequantised, packed_modules, weights_hash

# -------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores(build: Build, scheme: str) -> None:
    """Every metric, from activations that hooks captured in the very same model."""
    model = build(scheme)
    assert {found.name for found in packed_modules(model).values()} == {SCHEMES[scheme][0]}
    results = {metric: attribute(model, ragged(), metric=metric) for metric in METRICS[:2]}
    assert {"taylor", "fisher"} == set(METRICS[2:])
    if scheme != "torchao-int8-dynamic":
        results |= {metric: attribute(model, ragged(), metric=metric) for metric in METRICS[2:]}
    else:
        for metric in METRICS[2:]:
            with pytest.raises(ValueError, match=r"o_proj' \(torchao\) passes no gradient"):
                attribute(model, ragged(), metric=metric)
    weights = weights_of(model)
    for metric, result in results.items():
        wanted = expected(passing(model, metric), ragged(), metric, "labels", weights=weights)
        assert_close(result, *wanted, 1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_unfinished_run_goes_on(build: Build, scheme: str, tmp_path: Path) -> None:
    model = build(scheme)
    whole = attribute(model, ragged())

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from ragged()[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute(build(scheme), broken(), resume_dir=tmp_path, save_every_seconds=0)
    ran: list[int] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *_: ran.append(1))
    found = attribute(model, ragged(), resume_dir=tmp_path, save_every_seconds=0)
    handle.remove()
    assert len(ran) == len(ragged()) - 1
    assert all(torch.equal(found.scores[name], whole.scores[name]) for name in whole.scores)


@pytest.mark.parametrize("scheme", ["bnb-8bit", "bnb-nf4", "torchao-int8", *LAID_OUT])
def test_scores_in_bfloat16(build: Build, scheme: str) -> None:
    model = build(scheme, torch.bfloat16)
    for metric in ("variance", "fisher"):
        result = attribute(model, ragged(), metric=metric)
        weights = weights_of(model)
        wanted = expected(passing(model, metric), ragged(), metric, "labels", weights=weights)
        assert_close(result, *wanted, TOLERANCE[torch.bfloat16])


def test_the_padding_that_a_scheme_sees_is_the_models_own(build: Build) -> None:
    """LLM.int8 keeps a channel exact where any token of the batch, or padding, is large in it."""
    model = build("bnb-8bit")
    seen: list[Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    attribute(model, ragged()[:1])
    with torch.no_grad():
        model(**{k: v for k, v in ragged()[0].items() if k != "labels"})
    assert torch.equal(*seen)
    assert bool((seen[0].abs() >= 1.5).any())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_what_its_module_computes_with(build: Build, scheme: str) -> None:
    model = build(scheme)
    for name in packed_modules(model):
        module = model.get_submodule(name)
        if hasattr(module, "in_features"):
            plain = dequantised(module)  # before it runs, and lays its weight out anew
            wanted = stands_for(module)
            if scheme in LAID_OUT:
                assert torch.equal(bnb_layouts.computed(module), plain)
                module.bias = None  # else it is added to what was rounded
                put_out = module(torch.eye(module.in_features))
                assert torch.equal(put_out.t(), plain.bfloat16().float())
            assert plain is not None
            assert plain.shape == (module.out_features, module.in_features)
            # bitsandbytes has 1 / 127**2 in its products to five digits.
            torch.testing.assert_close(plain, wanted, rtol=3e-5, atol=1e-6)
    assert dequantised(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wrong_weight_is_noticed(
    build: Build, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above tells a dequantisation that is off by a hundredth in one column."""
    model = build(scheme)
    weights = weights_of(model)

    def wrong(module: nn.Module) -> Tensor | None:
        plain = dequantised(module)
        assert plain is not None
        return torch.cat([plain[:, :1] * 1.01, plain[:, 1:]], dim=1)

    monkeypatch.setattr("ssah.attribution.scores.dequantised", wrong)
    result = attribute(model, ragged())
    with pytest.raises(AssertionError, match="times the tolerance"):
        assert_close(
            result, *expected(model, ragged(), "variance", "labels", weights=weights), 1e-4
        )


@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_identity_is_that_of_the_weight_in_every_layout(build: Build, scheme: str) -> None:
    """bitsandbytes rounds value and scale of a weight to bfloat16 as it lays it out anew."""
    models = [build(name) for name in (scheme, *LAID_OUT) if name.startswith(scheme)]
    hashes = [weights_hash(model) for model in models]
    bnb_layouts.run_once(models[1])
    assert {*hashes, weights_hash(models[1])} == {weights_hash(models[0])}
    plain, before, after = ([dequantised(m) for m in bnb_layouts.projections(x)] for x in models)
    for exact, first, second in zip(plain, before, after, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, exact, rtol=ROUNDED, atol=0)
    assert len({weights_hash(build(other)) for other in FOUR_BIT}) == 2
    for place in (0, -1):  # one code of one weight, one scale
        for model in models:
            module = bnb_layouts.projections(model)[0]
            module.weight.data.view(-1)[place] ^= 1
            assert weights_hash(model) != hashes[0]
            module.weight.data.view(-1)[place] ^= 1
    state = bnb_layouts.projections(models[2])[0].weight.quant_state
    state.absmax[0, 0] *= 1.01
    assert weights_hash(models[2]) != hashes[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_scores_do_not_depend_on_having_run(build: Build, scheme: str, metric: str) -> None:
    before, after = (build(name) for name in LAID_OUT if name.startswith(scheme))
    scores = attribute(before, ragged(), metric=metric).scores
    for name, score in attribute(after, ragged(), metric=metric).scores.items():
        assert torch.equal(scores[name], score)


def laid_out(module: Any) -> dict[str, Any]:
    """What bitsandbytes knows of the layout of a 4-bit weight, and its bytes."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return {}
    return {**{name: repr(v) for name, v in vars(state).items()}, "": module.weight.data.tolist()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_model_is_left_as_it_was(build: Build, scheme: str) -> None:
    model = build(scheme)
    inputs = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        before = model(**inputs).logits
    weights = {n: dequantised(model.get_submodule(n)) for n in packed_modules(model) if "proj" in n}
    states = {n: laid_out(model.get_submodule(n)) for n in packed_modules(model)}
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    model.train()
    attribute(model, ragged())
    if scheme != "torchao-int8-dynamic":
        attribute(model, ragged(), metric="taylor")
    with ssah.ablate(model, draw(model)):
        pass
    assert model.training
    assert required == {n: p.requires_grad for n, p in model.named_parameters()}
    assert not any(p.is_inference() for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, weight in weights.items():
        assert torch.equal(dequantised(model.get_submodule(name)), weight)
    for name, state in states.items():
        assert laid_out(model.get_submodule(name)) == state
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, before)


def test_groups_resemble_those_of_the_plain_model(build: Build, folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain").eval()

    def redundant(model: PreTrainedModel) -> ssah.UnitSet:
        safety, utility = (attribute(model, [part]) for part in ragged())
        return ssah.classify(safety, utility, scu=0.1, ucu=0.1, ru=0.2)["ru"]

    wanted = redundant(plain)
    for scheme, least in (("bnb-8bit", 0.9), ("torchao-int8", 0.9), ("torchao-int4", 0.5)):
        found = redundant(build(scheme))
        share = len(found & wanted) / len(wanted)
        assert share >= least, (scheme, share)  # 0.2 by chance
        assert found != wanted or scheme != "torchao-int4"


# ------------------------------------------------------------------------------------ ablation


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ablation(build: Build, scheme: str) -> None:
    """The same as channels that a hook keeps from entering B, and as zero columns of B."""
    model = build(scheme)
    units = draw(model)
    dense = copy.deepcopy(model)
    for name in units:
        module = dense.get_submodule(name)
        kept = (~units.mask(name)).float()
        if scheme in ROUNDING:
            module.register_forward_pre_hook(lambda _, args, kept=kept: (args[0] * kept,))
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = nn.Parameter(stands_for(module) * kept)
        if module.bias is not None:
            plain.bias = module.bias
        dense.set_submodule(name, plain)
    with torch.no_grad():
        whole, without = model(**batch()).logits, dense(**batch()).logits
        with ssah.ablate(model, units):
            torch.testing.assert_close(model(**batch()).logits, without, rtol=1e-4, atol=1e-4)
            with ssah.ablate(model, units):
                pass
            torch.testing.assert_close(model(**batch()).logits, without, rtol=1e-4, atol=1e-4)
        with pytest.raises(KeyError), ssah.ablate(model, units):
            raise KeyError
        assert torch.equal(model(**batch()).logits, whole)
        halved = Scale(units, 0.5)
        with ssah.intervene(model, halved, halved), ssah.arms(model, [halved]) as run:
            eighth = model(**run.repeat(batch())).logits
        with ssah.intervene(model, Scale(units, 0.125)):
            torch.testing.assert_close(model(**batch()).logits, eighth, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, without, rtol=1e-3)
    assert not torch.allclose(whole, eighth, rtol=1e-3)
    name = next(name for name in units if len(units[name]))
    for change in (Zero(f"{name}.weight"), Replace(units, {})):
        with pytest.raises(ValueError, match=r"plain|is no parameter"):
            ssah.intervene(model, change)


@pytest.mark.parametrize("scheme", ["bnb-nf4", *LAID_OUT])
def test_scores_of_ablated_units_are_zero(build: Build, scheme: str) -> None:
    model = build(scheme)
    units = draw(model)
    with ssah.ablate(model, units):
        scores = attribute(model, ragged()).scores
    for name, score in scores.items():
        assert torch.equal(score == 0, units.mask(name))
