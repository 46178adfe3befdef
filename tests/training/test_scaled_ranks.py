"""Scaled gradients of a sharded model: whether a step is skipped is one answer for all ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from ranks import start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ssah_kernels.optim import MaskedAdamW


def overflow_on_one_rank(rank: int, n: int, folder: Path) -> None:
    model = torch.nn.Linear(4, 6, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (n,)))
    weight = model.weight
    rows = torch.tensor([0, 1, 4])  # of rank 0 the first two, of rank 1 the last one
    optimizer = MaskedAdamW([{"params": [weight], "indices": [rows]}], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        if (step, rank) == (1, 1):
            weight.grad.to_local()[1, 0] = torch.inf
        before = weight.to_local().detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved = (weight.to_local() != before).any(1).tolist()
        trains = [True, True, False] if rank == 0 else [False, True, False]
        assert moved == (trains if step != 1 else [False] * 3), (rank, step)
        assert float(optimizer.state[weight]["step"]) == (1.0, 1.0, 2.0)[step]
        assert scaler.get_scale() == (4.0, 2.0, 2.0)[step]


def test_every_rank_skips_a_step_that_overflowed_on_one(tmp_path: Path) -> None:
    start(overflow_on_one_rank, 2, tmp_path / "ranks")
