"""Plans: what trains, what it costs, and that the model stays an ordinary one to everybody else.

`family_checks.py` compares the gradients of every family.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, draw, in_plan_order, loss_of, masks, snapshot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ssah
from ssah.training import UpdatePlan, freeze, plan_of, runs, train_only
from ssah.training.splitting import MaskedProjection
from ssah.units import UnitSet, find_modules
from ssah_kernels.optim import MaskedAdamW

# -------------------------------------------------------------------------- what it computes


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


@pytest.mark.parametrize("seed", range(4))
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


# ------------------------------------------------------------------------------- what it costs


def test_gradients_state_and_activations_exist_for_what_trains_alone() -> None:
    def kept(model: nn.Module) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        own |= {
            slot.storage.untyped_storage().data_ptr()
            for module in model.modules()
            if isinstance(module, MaskedProjection)
            for slot in module.split_tensors.values()
        }
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model).backward()
        return sum(seen.values())

    model = tiny_models.build("llama")
    dense = kept(model)
    plan = train_only(model, draw(model, 0.2))
    assert kept(model) < 0.75 * dense
    trained = [p for p in model.parameters() if p.grad is not None]
    assert {id(p) for p in trained} == {id(p) for p in plan.parameters()}
    optimizer = plan.optimizer()
    optimizer.step()
    elements = sum(p.numel() for p in plan.parameters())
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert state == 2 * elements
    assert elements < 0.2 * plan.n_parameters


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.build("llama")
    n_all = sum(p.numel() for p in model.parameters())
    plan = train_only(model, draw(model))
    n_trained = sum(p.numel() for p in plan.parameters())
    plan.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {n_trained:,d} || all params: {n_all:,d} || "
        f"trainable%: {100 * n_trained / n_all:.4f}\n"
    )


# ------------------------------------------------------------- an ordinary model to the others


@pytest.mark.parametrize("family", ["llama_bias", "gpt2", "phi3"])
def test_close_gives_the_ordinary_model_back(family: str) -> None:
    model = tiny_models.build(family)
    first = next(model.parameters()).requires_grad_(False)
    names = [(name, id(p), p.shape, p.requires_grad) for name, p in model.named_parameters()]
    classes = [type(module) for module in model.modules()]
    before = snapshot(model)
    with freeze(model, draw(model)) as plan:
        assert first.requires_grad
        loss_of(model).backward()
    assert plan.closed
    plan.close()
    after = [(name, id(p), p.shape, p.requires_grad) for name, p in model.named_parameters()]
    assert names == after
    assert classes == [type(module) for module in model.modules()]
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())
    assert_equal(snapshot(model), before)
    assert not any("forward" in vars(module) for module in model.modules())
    for call in (plan.verify, plan.parameters, plan.importance):
        with pytest.raises(RuntimeError, match="plan is closed"):
            call()


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "phi3"])
def test_state_dict_loads_into_and_out_of_a_plan(family: str, tmp_path: Path) -> None:
    model = tiny_models.build(family)
    plan = train_only(model, draw(model))
    other = tiny_models.build(family, seed=1)
    wanted = snapshot(other)
    assert not any(model.load_state_dict(wanted))
    assert_equal(snapshot(model), wanted)
    torch.testing.assert_close(loss_of(model), loss_of(other))
    with pytest.raises(RuntimeError, match="frozen entries of"):
        plan.verify()
    model.save_pretrained(tmp_path)
    assert_equal(snapshot(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted)
    wrong = {name: value[..., :-1] for name, value in wanted.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(wrong)
    missing = dict(list(wanted.items())[:-3])
    assert model.load_state_dict(missing, strict=False).missing_keys
    assert_equal(snapshot(model), wanted)


def test_deepcopy_trains_on_its_own() -> None:
    model = tiny_models.build("llama_bias")
    plan = train_only(model, draw(model))
    twin = copy.deepcopy(model)
    before = snapshot(model)
    twin_plan = plan_of(twin)
    assert twin_plan is not None
    assert twin_plan is not plan
    assert twin_plan.model is twin
    optimizer = twin_plan.optimizer(lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(twin).backward()
        optimizer.step()
    assert_equal(snapshot(model), before)
    moved = snapshot(twin)
    assert any(not torch.equal(moved[name], before[name]) for name in moved)
    twin_plan.verify()
    for module in twin.modules():
        if isinstance(module, MaskedProjection):
            for slot in module.split_tensors.values():
                assert slot.order is None or module._parameters[slot.names[0]]._is_view() is False
    twin_plan.close()
    assert_equal(snapshot(twin), moved)
    plan.verify()


def test_values_that_replace_a_parameters_storage_are_used() -> None:
    model = tiny_models.build("llama")
    plan = train_only(model, draw(model))
    before = loss_of(model)
    for parameter in plan.parameters():
        parameter.data = parameter.data * 2
    doubled = snapshot(model)
    assert loss_of(model) != before
    plan.verify()
    plan.close()
    assert_equal(snapshot(model), doubled)


def test_conversion_keeps_the_aliasing() -> None:
    model = tiny_models.build("llama_bias")
    plan = train_only(model, draw(model))
    model.double()
    for module in plan.masked.values():
        for slot in module.split_tensors.values():
            assert slot.storage.dtype == torch.float64
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    first = loss_of(model)
    first.backward()
    optimizer.step()
    assert loss_of(model) < first
    with pytest.raises(RuntimeError, match="another dtype"):
        plan.verify()
    plan.close()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_change_between_forward_and_backward_is_noticed() -> None:
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        model = tiny_models.build("llama")
        plan = train_only(model, draw(model))
        loss = loss_of(model)
        with torch.no_grad():
            model.get_submodule(f"model.layers.1.{name}").weight_trained.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        plan.close()
    model = tiny_models.build("llama")
    train_only(model, draw(model))
    (loss_of(model, 0) + loss_of(model, 1)).backward()  # two forward passes, then one backward


def gradients(plan: UpdatePlan) -> list[Tensor]:
    result = [p.grad.clone() for p in plan.parameters() if p.grad is not None]
    for parameter in plan.parameters():
        parameter.grad = None
    return result


def test_accumulation_checkpointing_and_modes() -> None:
    model = tiny_models.build("llama_bias")
    plan = train_only(model, draw(model))
    loss_of(model, 0).backward()
    first = gradients(plan)
    loss_of(model, 1).backward()
    second = gradients(plan)
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    for both, one, other in zip(gradients(plan), first, second, strict=True):
        torch.testing.assert_close(both, one + other)
    model.train()
    model.gradient_checkpointing_enable()
    loss_of(model, 0).backward()
    for recomputed, one in zip(gradients(plan), first, strict=True):
        torch.testing.assert_close(recomputed, one)
    model.gradient_checkpointing_disable()
    model.eval()
    with torch.no_grad():
        assert not loss_of(model).requires_grad
    with torch.inference_mode():
        loss_of(model)
    plan.verify()


@pytest.mark.parametrize("family", ["llama_bias", "gpt2"])
def test_autocast_as_torch_does(family: str) -> None:
    model = tiny_models.build(family)
    dense = copy.deepcopy(model)
    plan = train_only(model, draw(model))
    own = dict(dense.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = loss_of(model), loss_of(dense)
    assert abs(ours - theirs) < 2e-2 * theirs
    ours.backward()
    theirs.backward()
    for name, parameter, entries, _ in plan.trained_slices():
        dim = plan.entries[name].dim
        expected = own[name].grad.index_select(dim, entries)  # type: ignore[union-attr]
        expected = expected.t() if dim == 1 else expected
        assert parameter.grad.dtype == torch.float32  # type: ignore[union-attr]
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error < 0.1, name


@pytest.mark.parametrize("family", ["llama_bias", "gpt2"])
def test_compiles_whole(family: str) -> None:
    model = tiny_models.build(family)
    plan = train_only(model, draw(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    inputs = tiny_models.collate(tiny_models.rows((9, 9, 9)), labels=False)
    for _ in range(2):
        model(**inputs).logits.square().mean().backward()
        eager = gradients(plan)
        compiled(**inputs).logits.square().mean().backward()
        for parameter, expected in zip(plan.parameters(), eager, strict=True):
            torch.testing.assert_close(parameter.grad, expected)
        optimizer.step()
        optimizer.zero_grad()
    plan.verify()
    torch._dynamo.reset()


def ddp_worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = tiny_models.build("llama_bias")
    plan = train_only(model, draw(model))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = plan.optimizer(lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(parallel, 2 * step + rank).backward()
        optimizer.step()
    plan.verify()
    torch.save(snapshot(model), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        ddp_worker, args=(str(tmp_path),), nprocs=2, start_method="fork"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(first, second)
    model = tiny_models.build("llama_bias")
    plan = train_only(model, draw(model))
    optimizer = plan.optimizer(lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        (sum(loss_of(model, 2 * step + rank) for rank in range(2)) / 2).backward()
        optimizer.step()
    for name, value in snapshot(model).items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------- frozen means frozen


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.0.mlp.up_proj.weight", -1),
        ("model.layers.1.mlp.down_proj.weight", -1),
        ("model.layers.0.self_attn.o_proj.weight", 0),
        ("model.layers.1.mlp.gate_proj.bias", -1),
        ("model.embed_tokens.weight", 3),
        ("model.norm.weight", 5),
    ],
)
def test_verify_sees_a_single_flipped_bit(name: str, row: int) -> None:
    model = tiny_models.build("llama_bias")
    units = draw(model, 0.2)
    plan = train_only(model, units)
    plan.verify()
    owner, _, leaf = name.rpartition(".")
    if owner in plan.masked:
        slot = plan.masked[owner].split_tensors[leaf]
        trained = set(slot.trained_index().tolist())
        order = range(len(slot.storage)) if slot.order is None else slot.order.tolist()
        frozen = [i for i, entry in enumerate(order) if entry not in trained]
        target = slot.storage[frozen[row]]
    else:
        target = model.get_parameter(name).data[row]
    bits = target.reshape(-1)[-1:].view(torch.int32)
    bits ^= 1
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        plan.verify()
    bits ^= 1
    plan.verify()


def test_stale_gradients_and_momentum_move_nothing_frozen() -> None:
    model = tiny_models.build("llama")
    old = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    loss_of(model).backward()
    old.step()
    plan = freeze(model, draw(model))
    with pytest.raises(RuntimeError, match="parameters that the plan has replaced"):
        old.step()
    plan.verify()
    plan.close()
    old.step()  # no plan, no objection


# ------------------------------------------------------------------------------- wrong use


def test_wrong_use_is_refused() -> None:
    model = tiny_models.build("llama")
    units = draw(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match="units is list"):
        freeze(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lacks"):
        freeze(model, draw(tiny_models.build("gpt2")))
    with pytest.raises(ValueError, match="units in"):
        train_only(model, UnitSet({}, dict.fromkeys(units, 5)))
    with pytest.raises(ValueError, match="leave nothing to train"):
        train_only(model, units - units)
    with pytest.raises(ValueError, match=r"extra_parameters has names .* nonsense"):
        train_only(model, units, extra_parameters=["nonsense"])
    with pytest.raises(TypeError, match="collection of parameter names"):
        train_only(model, units, extra_parameters="lm_head.weight")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        freeze(nn.Linear(2, 2), units)  # type: ignore[arg-type]
    assert_equal(snapshot(model), before)
    assert all(p.requires_grad for p in model.parameters())
    plan = train_only(model, units)
    for call in (
        lambda: freeze(model, units),
        lambda: ssah.ablate(model, units),
        lambda: ssah.prune(model, units),
        lambda: ssah.attribute(model, [batch()]),
    ):
        with pytest.raises((ValueError, RuntimeError), match="close it first"):
            call()
    with pytest.raises(RuntimeError, match="no optimiser has stepped"):
        plan.importance()
    plan.optimizer()
    plan.close()


def test_quantised_and_unloaded_bases_are_refused() -> None:
    model = tiny_models.build("llama")
    units = draw(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="meta"):
        freeze(empty, units)
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        freeze(model, units)
    model.is_quantized = False
    weight = model.model.layers[0].mlp.up_proj.weight
    packed = weight.data.to(torch.int8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.*int8"):
        freeze(model, units)


def test_optimiser_state_of_other_units_is_refused() -> None:
    model = tiny_models.build("llama")
    plan = train_only(model, draw(model, seed=1))
    optimizer = plan.optimizer()
    loss_of(model).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    generic = torch.optim.AdamW(plan.param_groups(), lr=1e-3)
    plan.close()
    other = train_only(model, draw(model, seed=2))
    with pytest.raises(ValueError, match="another plan"):
        other.optimizer().load_state_dict(saved)
    loaded = torch.optim.AdamW(other.param_groups(), lr=1e-3)
    loaded.load_state_dict(generic.state_dict())
    loss_of(model).backward()
    with pytest.raises(ValueError, match="another plan"):
        loaded.step()
    other.close()
    again = train_only(model, draw(model, seed=1))
    again.optimizer().load_state_dict(saved)


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


def test_runs() -> None:
    assert runs(torch.tensor([], dtype=torch.int64)) == []
    assert runs(torch.tensor([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]
