"""Training some units of routed experts and keeping the others frozen.

`family_checks.py` compares the gradients of every family.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from plans import draw, loss_of, make, masks, snapshot
from tiny_models import build
from transformers import AutoModelForCausalLM

from ssah.training import freeze, load_update, plan_of, train_only
from ssah.units import UnitSet

MODES = ("freeze", "train_only")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_training_equals_dense_training_with_the_frozen_put_back(
    name: str, mode: str, tmp_path: Path
) -> None:
    model = build(name, dtype=torch.float64)
    dense, base = copy.deepcopy(model), copy.deepcopy(model)
    before, units = snapshot(model), draw(model)
    frozen = {key: mask == 0 for key, mask in masks(model, units, mode).items()}
    plan = make(model, mode, units)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(p.numel() for p in plan.parameters()) == sum(
        int((~mask).sum()) for mask in frozen.values()
    )
    ours, theirs = (
        torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for each in (plan, dense)
    )
    for step in range(3):
        for each, optimizer in ((model, ours), (dense, theirs)):
            optimizer.zero_grad()
            loss_of(each, step).backward()
            optimizer.step()
        with torch.no_grad():
            for key, parameter in dense.named_parameters():
                parameter[frozen[key]] = before[key][frozen[key]]
    plan.verify()
    after = snapshot(model)
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(after[key], value, rtol=1e-9, atol=1e-12)
        if key in frozen:
            assert torch.equal(after[key][frozen[key]], before[key][frozen[key]]), key
    plan.save_pretrained(tmp_path)
    plan.close()
    load_update(base, tmp_path)
    for each in (model, base):
        assert all(torch.equal(value, after[key]) for key, value in each.state_dict().items())
        assert [type(m) for m in each.modules()] == [type(m) for m in dense.modules()]


def test_the_model_stays_an_ordinary_one(tmp_path: Path) -> None:
    model = build("gpt_oss")
    before = snapshot(model)
    plan = make(model, "freeze")
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(RuntimeError, match="gate_up_proj of this MaskedGptOssExperts is split"):
        experts.gate_up_proj  # noqa: B018
    twin = copy.deepcopy(model)
    own = plan_of(twin)
    assert own is not None
    optimizer = own.optimizer(lr=1e-2, track_importance=True)
    loss_of(twin).backward()
    optimizer.step()
    own.verify()
    importance = own.importance().squared["model.layers.1.mlp.experts.down_proj[1]"]
    trained = own.trained_units.mask("model.layers.1.mlp.experts.down_proj[1]")
    assert bool((importance > 0).eq(trained).all())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, value in snapshot(model).items():
        assert torch.equal(value, before[key])
        assert torch.equal(value, again.state_dict()[key])
    model.load_state_dict(twin.state_dict())
    torch.testing.assert_close(loss_of(model), loss_of(twin))
    plan.close()
    assert type(experts).__name__ == "GptOssExperts"


def test_a_layer_without_frozen_units_is_left_alone() -> None:
    model = build("mixtral")
    b = "model.layers.1.mlp.experts.down_proj[2]"
    units = UnitSet({b: [0, 3]}, {b: 72})
    with freeze(model, units) as plan:
        assert set(plan.masked) == {"model.layers.1.mlp.experts"}
        optimizer = plan.optimizer(track_importance=True)
        loss_of(model).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"layers.0.mlp.experts.*trains whole"):
            plan.importance()
    up = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(ValueError, match=r"extra_parameters has .*gate_up_proj.*none of them"):
        train_only(model, units, extra_parameters=(up,))
    assert plan_of(model) is None


def test_lent_slices_and_transforms_give_the_gradients_of_a_step() -> None:
    model = build("gpt_oss", dtype=torch.float64)
    with make(model, "train_only", draw(model)):
        experts = model.model.layers[0].mlp.experts
        g = torch.Generator().manual_seed(0)
        x = torch.randn(7, 48, dtype=torch.float64, generator=g)
        weights, chosen = torch.rand(7, 4, dtype=torch.float64, generator=g).topk(2)
        own = {name: p.detach().clone() for name, p in experts.named_parameters()}

        def loss(slices: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(experts, slices, (x, chosen, weights)).square().sum()

        found = torch.func.grad(loss)(own)
        lent = {name: value.clone().requires_grad_() for name, value in own.items()}
        loss(lent).backward()
        experts(x, chosen, weights).square().sum().backward()
        trained = {name: p for name, p in experts.named_parameters() if p.requires_grad}
        assert len(trained) == 3
        for name, parameter in trained.items():
            torch.testing.assert_close(found[name], parameter.grad)
            torch.testing.assert_close(lent[name].grad, parameter.grad)
