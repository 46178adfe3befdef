"""What two processes compute of every family, each holding a half of every weight.

Starting processes takes longer than what they do: one pair serves many families.
"""

from __future__ import annotations

import atexit
import functools
import shutil
from pathlib import Path
from tempfile import mkdtemp

import tiny_models
import torch
import torch.distributed as dist
from in_float64 import InFloat64
from plans import make
from ranks import MODES, batches, shard, start, train
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException
from transformers import PreTrainedModel

from ssah.attribution import Attribution, attribute
from ssah.distributed import deal
from ssah_kernels.sharded import is_sharded, local

BATCHES = 3  # the second process has one, and waits in step while the first has two
# With a large eps a step is nearly in proportion to the gradient, not to its rounding where it is
# zero.
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-2}


def tiny(family: str) -> PreTrainedModel:
    """The family's tiny model, all of it in float64: FSDP2 takes one type alone."""
    return tiny_models.build(family, dtype=torch.float64).double()


def results_of_two(
    family: str, among: tuple[str, ...]
) -> tuple[Attribution, dict[str, dict[str, Tensor]]]:
    """Scores of a family's tiny model, and its weights after a step of each mode in turn.

    They are computed for all of ``among`` at once.
    """
    folder, end = _run(among)
    folder = folder / family
    assert (folder / "1.pt").is_file(), f"the two processes did not get to {family!r}: {end}"
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    states = {
        mode: {name: torch.cat([rows, second[mode][name]]) for name, rows in state.items()}
        for mode, state in first.items()
    }
    return Attribution.load(folder / "scores"), states


@functools.cache
def _run(among: tuple[str, ...]) -> tuple[Path, str]:
    """The folder of what they computed, and how they ended."""
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder)
    try:
        start(functools.partial(_score_and_train, among), 2, folder)
    except ProcessException as error:
        return folder, str(error)
    return folder, "they ended early"


def _score_and_train(among: tuple[str, ...], rank: int, n: int, folder: Path) -> None:
    for family in among:
        model = shard(tiny(family), n)
        scores = attribute(model, deal(batches(BATCHES)))
        states = {}
        for mode in MODES:
            with make(model, mode) as plan:
                with InFloat64():
                    train(model, plan.optimizer(**OPTIONS), range(1), rank, n)
                plan.verify()
            states[mode] = {
                name: local(value).clone()
                for name, value in model.state_dict().items()
                if is_sharded(value)  # buffers are not
            }
        if rank == 0:
            scores.save(folder / family / "scores")
        dist.barrier()
        torch.save(states, folder / family / f"{rank}.pt")
