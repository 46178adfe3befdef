"""What a plan computes: the updates of dense training whose frozen entries are put back.

`family_checks.py` compares the gradients of every family.
"""

from __future__ import annotations

import copy
import time

import pytest
import tiny_models
import torch
from plans import draw, in_plan_order, loss_of, masks, snapshot
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.training import UpdatePlan, freeze, train_only
from ssah.training.splitting.masked_linear import MaskedLinearFunction
from ssah.units import UnitSet, find_modules
from ssah_kernels.optim import MaskedAdamW


def test_matches_dense_training_whose_frozen_entries_are_restored() -> None:
    model = tiny_models.build("llama_bias")
    dense = copy.deepcopy(model)
    units = draw(model, 0.2)
    trains = masks(model, units, "train_only")
    start = {n: p.detach().clone() for n, p in dense.named_parameters()}
    plan = train_only(model, units)
    ours = plan.optimizer(lr=1e-3, weight_decay=0.01)
    decays = [p for p in dense.parameters() if p.dim() > 1]
    others = [p for p in dense.parameters() if p.dim() == 1]
    theirs = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
    )
    for step in range(20):
        ours.zero_grad()
        loss_of(model, step).backward()
        ours.step()
        theirs.zero_grad()
        loss_of(dense, step).backward()
        theirs.step()
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.copy_(torch.where(trains[name] == 1, parameter, start[name]))
    assert update_error(model, dense, start) < 1e-3
    plan.verify()


def update_error(a: nn.Module, b: nn.Module, start: dict[str, Tensor]) -> float:
    """Norm of the difference of two updates, relative to the second."""
    x, y = a.state_dict(), b.state_dict()
    difference = torch.stack([(x[n] - y[n]).double().norm() for n in start]).norm()
    update = torch.stack([(y[n] - start[n]).double().norm() for n in start]).norm()
    return float(difference / update)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2, 3))]
)
@pytest.mark.parametrize(
    ("dtype", "lr", "limit"),
    [(torch.float32, 3e-2, 1e-6), (torch.float32, 1e-3, 1e-6), (torch.float64, 1e-5, 1e-9)],
)
def test_every_single_step_from_equal_state(
    dtype: torch.dtype, lr: float, limit: float, seed: int
) -> None:
    # The dense model has its channels in the plan's order, so that both add up in one order: in
    # another one, a step of float32 can be several times further off. Where float32 does not
    # resolve a step that far (its gradients are small beside the terms they are sums of, or the
    # step beside the last bit of a weight), the limit is what the dense model's own step misses the
    # exact one by, which is computed in float64 and then rounded.
    model = tiny_models.build("llama", seed=seed, dtype=dtype)
    trains = masks(model, draw(model, 0.2), "train_only")
    plan = train_only(model, draw(model, 0.2))
    optimizer = plan.optimizer(lr=lr)
    dense = tiny_models.build("llama", dtype=dtype)
    exact = tiny_models.build("llama", dtype=torch.float64)
    for step in range(8):
        before = snapshot(model)
        exact.to(torch.float64)
        for each in (dense, exact):
            each.load_state_dict(in_plan_order(plan, before))
            each.zero_grad()
            dense_step(each, step, lr, in_plan_order(plan, trains), plan, optimizer)
            each.load_state_dict(in_plan_order(plan, each.state_dict(), back=True))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        resolution = update_error(dense, exact.to(dtype), before)
        assert update_error(model, dense, before) < max(limit, 3 * resolution)


def dense_step(
    dense: PreTrainedModel,
    step: int,
    lr: float,
    trains: dict[str, Tensor],
    plan: UpdatePlan,
    optimizer: torch.optim.Optimizer,
) -> None:
    """A step of everything from the plan's optimiser state, then frozen entries put back."""
    before = {n: p.detach().clone() for n, p in dense.named_parameters()}
    singles = []
    for name, parameter in dense.named_parameters():
        decay = 0.01 if parameter.dim() > 1 else 0.0
        single = MaskedAdamW([parameter], lr=lr, weight_decay=decay)
        moments = full_state(plan, optimizer, name, before[name])
        if moments is not None:
            single.state[parameter] = {
                key: in_plan_order(plan, {name: value})[name] for key, value in moments.items()
            }
        singles.append(single)
    loss_of(dense, step).backward()
    for single in singles:
        single.step()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(torch.where(trains[name] == 1, parameter, before[name]))


def full_state(
    plan: UpdatePlan, optimizer: torch.optim.Optimizer, name: str, like: Tensor
) -> dict[str, Tensor] | None:
    """The plan's optimiser state of one original parameter, spread over its whole shape."""
    result: dict[str, Tensor] = {}
    for own, parameter, entries, _ in plan.trained_slices():
        if own != name or parameter not in optimizer.state:
            continue
        state, dim = optimizer.state[parameter], plan.entries[name].dim
        result["step"] = state["step"].clone()
        for key in ("exp_avg", "exp_avg_sq"):
            rows = state[key].t() if dim == 1 else state[key]
            full = result.setdefault(key, torch.zeros_like(like))
            full.index_copy_(dim, entries, rows.to(like.dtype))
    return result or None


def test_shared_value_rows_train_only_with_all_their_columns() -> None:
    model = tiny_models.build("llama")  # two query heads of 12 share one key/value head
    name = "model.layers.0.self_attn.o_proj"
    sizes = {n: m.n_units for n, m in find_modules(model).items()}
    plan = train_only(model, UnitSet({name: [0, 12, 1]}, sizes))
    value = model.model.layers[0].self_attn.v_proj
    assert value.split_tensors["weight"].trained_index().tolist() == [0]
    plan.close()
    plan = freeze(model, UnitSet({name: [1]}, sizes))
    frozen = set(range(24)) - set(value.split_tensors["weight"].trained_index().tolist())
    assert frozen == {1}
    assert len(model.model.layers[0].self_attn.o_proj.split_tensors["weight"].trained_index()) == 47


def test_also_names_parameters_that_train_whole() -> None:
    model = tiny_models.build("llama_tied")
    units = draw(model, 0.1)
    plan = train_only(
        model, units, extra_parameters=("lm_head.weight", "model.layers.0.mlp.gate_proj.weight")
    )
    assert model.get_input_embeddings().weight.requires_grad
    gate = model.model.layers[0].mlp.gate_proj
    assert len(gate.split_tensors["weight"].trained_index()) == 72
    loss_of(model).backward()
    assert gate.weight_trained.grad.shape == (72, 48)
    assert gate.weight_trained.data_ptr() == gate.split_tensors["weight"].storage.data_ptr()
    plan.verify()


@pytest.mark.parametrize("scope", ["mlp", "attention", "both"])
def test_importance_is_that_of_the_gradients(scope: str) -> None:
    """Also of modules of which the units that are frozen say nothing."""
    model = tiny_models.build("phi3", dtype=torch.float64)
    dense = copy.deepcopy(model)
    modules = find_modules(model)
    sizes = {name: module.n_units for name, module in modules.items()}
    own_sizes = {name: sizes[name] for name in sizes if scope in (modules[name].kind, "both")}
    units = UnitSet.random(round(0.3 * sum(own_sizes.values())), own_sizes, seed=0)
    trains = masks(model, UnitSet(dict(units.items()), sizes), "freeze")
    plan = freeze(model, units)
    optimizer = plan.optimizer(lr=0.0, track_importance=True)
    signed = {name: torch.zeros(m.n_units, dtype=torch.float64) for name, m in modules.items()}
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        dense.zero_grad()
        loss_of(dense, step).backward()
        own = dict(dense.named_parameters())
        for name, module in modules.items():
            for owned in (*module.inputs, module.output):
                p = own[owned.param]
                products = (p * p.grad * trains[owned.param]).detach()
                products = products.movedim(owned.dim, 0).flatten(1).sum(1)
                signed[name] += products[owned.index]
    found = plan.importance()
    for name, expected in signed.items():
        torch.testing.assert_close(found.signed[name], expected, rtol=1e-4, atol=1e-7)
        assert bool((found.squared[name] >= 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_as_fast_as_in_an_ordinary_layer(dtype: torch.dtype) -> None:
    """B lies transposed, and in that layout torch's product took 40 times as long."""
    x = torch.randn(32, 1024).to(dtype)
    plain = nn.Linear(1024, 512, dtype=dtype)
    storage = plain.weight.detach().t().contiguous()  # [in, out]
    part, split = nn.Parameter(storage[:100].clone()), MaskedLinearFunction.apply
    seconds = {}
    for name, run in (
        ("plain", lambda: plain(x)),
        ("split", lambda: split(x, storage, plain.bias, True, ((0, 100),), (), None, None, part)),
    ):
        y = run()
        times = []
        for _ in range(3):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        seconds[name] = min(times)
        wanted = x.double() @ plain.weight.double().t() + plain.bias.double()
        torch.testing.assert_close(y.double(), wanted, rtol=2e-2, atol=2e-2)
    # On a processor that has the arithmetic both are quick, and overheads count.
    assert seconds["split"] < 5 * seconds["plain"] + 1e-3


@pytest.mark.parametrize("is_output", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_projection_gives_may_be_written_to(dtype: torch.dtype, is_output: bool) -> None:
    """OLMo clamps what V gives in place, and Falcon adds to what an FFN gives."""
    x, storage = torch.randn(2, 3, 8).to(dtype), torch.randn(8, 8).to(dtype)
    part = nn.Parameter(storage[:2].clone())
    y = MaskedLinearFunction.apply(x, storage, None, is_output, ((0, 2),), (), None, None, part)
    y.mul_(2).sum().backward()
    ones = torch.full((6, 2 if not is_output else 8), 2.0, dtype=torch.float64)  # [tokens, out]
    flat = x.double().flatten(0, 1)  # [tokens, in]
    wanted = flat[:, :2].t() @ ones if is_output else ones.t() @ flat
    torch.testing.assert_close(part.grad.double(), wanted, rtol=2e-2, atol=2e-2)
