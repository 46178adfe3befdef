"""Plans in several processes: the same on each, and made after a model is sharded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed as dist
import trl_trainers
from plans import assert_equal, check_moved, draw, loss_of, masks, snapshot
from ranks import rows_of, shard, start, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ssah.training import freeze, prepare_trainer
from ssah.units import UnitSet, find_modules
from ssah_kernels.optim import MaskedAdamW


def as_many(model: PreTrainedModel, seed: int) -> UnitSet:
    """A fifth of the units of each FFN: slices of the same shapes, whatever the seed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    chosen = {
        name: torch.randperm(size, generator=generator)[: size // 5].sort().values
        for name, size in sizes.items()
        if "mlp" in name
    }
    return UnitSet(chosen, sizes)


def other_units(rank: int, n: int, folder: Path) -> None:
    model = tiny_models.build("llama")
    trains, before = masks(model, as_many(model, rank), "freeze"), snapshot(model)
    plan = freeze(model, as_many(model, rank))
    parallel = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="rank 1 trains other units than rank 0"):
        train(parallel, plan.optimizer(lr=1e-2), range(1), rank, n)
    plan.close()
    for name, value in model.state_dict().items():
        # As it was made, DistributedDataParallel gave the slices of rank 0 to all.
        same = slice(None) if rank == 0 else trains[name] == 0
        assert torch.equal(value[same], before[name][same]), name


def other_weights(rank: int, n: int, folder: Path) -> None:
    model = tiny_models.build("llama", seed=rank)
    plan = freeze(model, draw(model))
    parallel = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="rank 1 has other frozen weights than rank 0"):
        train(parallel, plan.optimizer(lr=1e-2), range(1), rank, n)


def equal_plans(rank: int, n: int, folder: Path) -> None:
    model = tiny_models.build("llama")
    trains, before = masks(model, draw(model), "freeze"), snapshot(model)
    plan = freeze(model, draw(model))
    train(DistributedDataParallel(model), plan.optimizer(lr=1e-2), range(2), rank, n)
    one = tiny_models.build("llama")
    alone = freeze(one, draw(one))
    train(one, alone.optimizer(lr=1e-2), range(2))  # the rows of all ranks
    wanted = one.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value[trains[name] == 0], before[name][trains[name] == 0]), name
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4)


def plans_of_their_own(rank: int, n: int, folder: Path) -> None:
    """Each rank trains a model of its own: nothing says that they must be alike."""
    model = tiny_models.build("llama", seed=rank)
    plan = freeze(model, draw(model, seed=rank))
    train(model, plan.optimizer(lr=1e-2), range(1))
    if rank == 0:  # nor that every rank has one
        twin = tiny_models.build("llama")
        train(twin, freeze(twin, draw(twin)).optimizer(lr=1e-2), range(1))


def sharded_afterwards(rank: int, n: int, folder: Path) -> None:
    for whole in (False, True):
        model = tiny_models.build("llama")
        plan = freeze(model, draw(model))
        if whole:
            fully_shard(model)
        else:
            shard(model, n)
        for act in (lambda: loss_of(model), model.state_dict, plan.verify, plan.close):  # noqa: B023
            with pytest.raises(RuntimeError, match="shard the model first, and make the plan then"):
                act()


def sharded_with_other_units(rank: int, n: int, folder: Path) -> None:
    model = shard(tiny_models.build("llama"), n)
    units = draw(tiny_models.build("llama"), seed=rank)
    with pytest.raises(ValueError, match="rank 1 trains other units than rank 0"):
        freeze(model, units)
    assert all(p.requires_grad for p in model.parameters())
    freeze(model, draw(tiny_models.build("llama")))


def under_a_trainer(rank: int, n: int, folder: Path) -> None:
    """As ``torchrun`` starts it: the trainer wraps the model in DistributedDataParallel itself."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the group is there already
    model = trl_trainers.build_model("dpo")
    trains, before = masks(model, draw(model), "freeze"), snapshot(model)
    plan = freeze(model, draw(model))
    trainer = trl_trainers.make(
        "dpo",
        model,
        folder / str(rank),
        optimizers=plan.optimizers,
        given={"ref_model": trl_trainers.build_model("dpo")},
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        ddp_backend="gloo",
    )
    prepare_trainer(plan, trainer)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    check_moved(model, before, trains)
    assert_equal(snapshot(trainer.accelerator.unwrap_model(trainer.ref_model)), snapshot(model))
    for name, value in snapshot(model).items():
        theirs = value.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(theirs, value), name


def evaluated_before(rank: int, n: int, folder: Path) -> None:
    """accelerate does not wrap a model that it has evaluated: each rank would train by itself."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the group is there already
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    args = TrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to="none")
    rows = [{name: value[0] for name, value in rows_of(0).items()}] * 4
    optimizer = plan.optimizer_cls_and_kwargs(args)
    trainer = Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, optimizer_cls_and_kwargs=optimizer
    )
    trainer.evaluate()
    with pytest.raises(RuntimeError, match="each rank would train by itself"):
        trainer.train()
    del model._is_accelerate_prepared
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)


def state_in_8_bits(rank: int, n: int, folder: Path) -> None:
    """Of sharded parameters the numbers are those of whole ones, and so is what is saved."""
    mesh = init_device_mesh("cpu", (n,))
    for dim, index in ((0, torch.tensor([1, 2, 5])), (1, torch.arange(0, 1024, 3))):
        generator = torch.Generator().manual_seed(dim)
        whole = nn.Parameter(torch.randn(6, 1024, generator=generator))
        parts = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
        one, ours, resumed = (
            MaskedAdamW(
                [{"params": [p], "indices": [index], "dims": [dim]}], lr=0.1, state_dtype="8bit"
            )
            for p in (whole, parts, parts)
        )
        for _ in range(3):
            whole.grad = torch.randn(6, 1024, generator=generator)
            parts.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            one.step()
            ours.step()
        assert torch.equal(parts.full_tensor(), whole)
        saved = ours.state_dict()
        for name, value in one.state[whole].items():
            if name == "step":
                continue
            full = saved["state"][0][name].full_tensor()
            # A row has its scales whether its columns train or not.
            by_row = dim == 1 and name.endswith("scales")
            assert torch.equal(full if by_row else full.index_select(dim, index), value), name
        resumed.load_state_dict(saved)
        for name, value in ours.state[parts].items():
            assert torch.equal(resumed.state[parts][name], value), name


@pytest.mark.parametrize(
    "worker",
    [
        pytest.param(under_a_trainer, marks=pytest.mark.exhaustive),
        other_units,
        other_weights,
        equal_plans,
        plans_of_their_own,
        sharded_afterwards,
        sharded_with_other_units,
        evaluated_before,
        state_in_8_bits,
    ],
)
def test_two_ranks(worker: object, tmp_path: Path) -> None:
    start(worker, 2, tmp_path)
