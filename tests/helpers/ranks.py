"""Processes of one group, what they score and train, and models that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from plans import loss_on
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from transformers import PreTrainedModel

from ssah.attribution import Attribution, attribute
from ssah.distributed import Ranks, deal
from ssah.units import layers_path

Batches = list[dict[str, Tensor]]
MODES = ("freeze", "train_only")
ROWS = 4  # of a step, over all ranks
PATIENCE = 300.0  # seconds that a process may take to end on a machine with much else to do


def start(worker: Any, n: int, folder: Path, **options: Any) -> Any:
    """Run ``worker(rank, n, folder)`` in n processes of one group."""
    folder.mkdir(exist_ok=True)
    return start_processes(
        in_group, args=(worker, n, folder), nprocs=n, start_method="fork", **options
    )


def in_group(rank: int, worker: Any, n: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    worker(rank, n, folder)
    dist.destroy_process_group()


def batches(n: int = 7, *, labels: bool = True) -> Batches:
    """Ragged batches of three rows."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 14, (n, 3), generator=generator).tolist()
    parts = [tiny_models.rows(each, seed=i) for i, each in enumerate(lengths)]
    return [tiny_models.collate(part, labels=labels) for part in parts]


def assert_close(ours: Attribution, one: Attribution, tolerance: float) -> None:
    """Equal in everything but rounding, which is measured against the largest of a module."""
    for kind in ("scores", "mean", "variance"):
        for name, expected in getattr(one, kind).items():
            actual = getattr(ours, kind)[name]
            bound = tolerance * expected.abs()
            if kind != "variance" and (kind == "mean" or one.metric == "taylor"):
                bound = tolerance * expected.abs().max()  # signed sums cancel
            assert bool(((actual - expected).abs() <= bound).all()), (kind, name)
    for field in ("count", "metric", "tokens", "units_hash", "data_fingerprint"):
        assert getattr(ours, field) == getattr(one, field), field


def same_bits(result: Attribution) -> bool:
    """Whether every rank holds the same result."""
    values = [*result.scores.values(), *result.mean.values(), *result.variance.values()]
    parts = Ranks.of().gather(torch.cat(values).view(torch.int64))
    return bool((parts == parts[0]).all())


def expect(kind: type[Exception], pattern: str, rank: int, culprit: int | None, **options: Any):
    """Score with ``options`` and see the error, which names the culprit on every other rank."""
    loader = options.pop("loader", None)
    model = options.pop("model", None) or tiny_models.build("llama")
    named = "" if culprit in (None, rank) else f"rank {culprit}: "
    with pytest.raises(kind, match=f"^{named}.*{pattern}"):
        attribute(model, deal(batches()) if loader is None else loader, **options)


def rows_of(step: int, rank: int = 0, n: int = 1) -> dict[str, Tensor]:
    """This rank's share of the rows of a step; equally long, so that means of means agree."""
    return tiny_models.collate(tiny_models.rows((9,) * ROWS, seed=100 + step)[rank::n])


def train(model: nn.Module, optimizer: Any, steps: range, rank: int = 0, n: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_on(model, rows_of(step, rank, n)).backward()
        optimizer.step()


def shard(model: PreTrainedModel, n: int) -> PreTrainedModel:
    mesh = init_device_mesh("cpu", (n,))
    for layer in model.get_submodule(layers_path(model)):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(n: int, family: str = "llama_bias") -> PreTrainedModel:
    return shard(tiny_models.build(family), n)
