"""To others a model under a plan is an ordinary one: copied, saved, moved, compiled, in DDP."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from plans import assert_equal, draw, loss_of, snapshot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ssah.training import UpdatePlan, freeze, plan_of, train_only
from ssah.training.splitting import MaskedProjection


@pytest.mark.parametrize("family", ["llama_bias", "gpt2", "phi3"])
def test_close_gives_the_ordinary_model_back(family: str) -> None:
    model = tiny_models.build(family)
    first = next(model.parameters()).requires_grad_(False)
    names = [(name, id(p), p.shape, p.requires_grad) for name, p in model.named_parameters()]
    classes = [type(module) for module in model.modules()]
    before = snapshot(model)
    with freeze(model, draw(model), unfreeze=True) as plan:
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
def test_a_state_dict_is_no_second_model_on_the_device(family: str, tmp_path: Path) -> None:
    model = tiny_models.build(family).cuda()
    plan = train_only(model, draw(model))
    split = {name for name, _ in plan.replaced()}
    state = model.state_dict()
    assert {name for name, value in state.items() if value.device.type == "cpu"} >= split
    assert any(value.is_cuda for value in state.values())
    other = snapshot(tiny_models.build(family, seed=1))
    model.load_state_dict(other)
    assert_equal({name: value.cpu() for name, value in model.state_dict().items()}, other)
    model.save_pretrained(tmp_path)
    assert_equal(snapshot(AutoModelForCausalLM.from_pretrained(tmp_path)), other)
    assert all(p.is_cuda for p in plan.parameters())  # the model itself is where it was


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


@pytest.mark.parametrize(
    "family", ["llama_bias", pytest.param("gpt2", marks=pytest.mark.exhaustive)]
)
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
