"""What ``verify`` sees beside bits, and what closing a plan leaves alone."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from plans import batch, draw, make
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ssah.training import freeze, train_only
from ssah.units import UnitSet


def mlp(units: UnitSet) -> UnitSet:
    return UnitSet({n: i for n, i in units.items() if "mlp" in n}, units.sizes)


def test_verify_names_adapters_on_what_is_frozen() -> None:
    model = tiny_models.build("llama")
    logits = model(**batch()).logits
    plan = train_only(model, mlp(draw(model)))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    assert not torch.equal(peft_model(**batch()).logits, logits)
    with pytest.raises(
        RuntimeError, match=r"q_proj' has frozen entries, and the adapter 'default'"
    ):
        plan.verify()
    with peft_model.disable_adapter():
        plan.verify()
    peft_model.unload()
    plan.verify()


def test_verify_lets_adapters_be_where_all_trains() -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, mlp(draw(model)))
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    plan.verify()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_verify_names_what_is_no_longer_in_its_place() -> None:
    model = tiny_models.build("llama")
    attention = model.model.layers[0].self_attn
    plan = train_only(model, draw(model))
    plan.verify()
    plain = attention.q_proj
    parametrize.register_parametrization(plain, "weight", Doubled())
    with pytest.raises(RuntimeError, match=r"q_proj\.weight', which has .*no longer where it was"):
        plan.verify()
    parametrize.remove_parametrizations(plain, "weight", leave_parametrized=False)
    plan.verify()
    attention.q_proj = nn.Sequential(plain)
    with pytest.raises(RuntimeError, match="no longer where it was"):
        plan.verify()
    attention.q_proj = plain
    mine = attention.o_proj
    attention.o_proj = nn.Linear(mine.in_features, mine.out_features, bias=False)
    with pytest.raises(RuntimeError, match=r"o_proj\.weight', which has .*no longer where it was"):
        plan.verify()
    attention.o_proj = mine
    mine.forward = lambda x: 2 * type(mine).forward(mine, x)
    with pytest.raises(RuntimeError, match=r"the forward of '.*o_proj', which has frozen entries"):
        plan.verify()
    del mine.forward
    plan.verify()


def test_a_slice_that_was_replaced_is_neither_saved_nor_closed() -> None:
    model = tiny_models.build("llama")
    plan = make(model, "freeze")
    part = next(iter(plan.masked.values()))
    name, own = next(iter(part.own.items()))
    part._parameters[name] = nn.Parameter(own.detach() + 1)
    for act in (model.state_dict, plan.verify, plan.close):
        with pytest.raises(RuntimeError, match="were replaced by other parameters"):
            act()
    part._parameters[name] = own
    plan.verify()
    plan.close()


def test_a_patch_of_others_outlives_the_plan() -> None:
    model = tiny_models.build("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    plan = make(model, "freeze")
    patch = first.forward = lambda x: x
    del second.forward
    plan.close()
    assert first.forward is patch
    assert "forward" not in vars(second)
    assert isinstance(first.down_proj, nn.Linear)
    assert "weight" in first.down_proj._parameters
