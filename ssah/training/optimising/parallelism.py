"""How a trainer or accelerate spreads a model over devices, and what its plan does about that.

| what spreads it | what the plan does |
|---|---|
| DistributedDataParallel | compares itself over the ranks, before anything is wrapped |
| FSDP2 | makes its model whole, and follows (`ssah.training.installing.following`) |
| DataParallel, FSDP1, DeepSpeed | refuses by name: they copy or flatten what the plan has split |

Example: ``accelerate launch`` with ``fsdp_version: 2``. The arguments of the trainer say so, and
the plan's optimiser is asked for with them, before the trainer shards the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssah.compat.accelerate import sharder
from ssah.distributed import Ranks
from ssah.training.installing import FLATTENS, Installed, await_sharding, check_alike
from ssah.training.optimising.active import retire


def meet_arguments(
    installed: Installed, args: Any, options: Mapping[str, Any], *, in_backward: bool
) -> None:
    """Do what the ``TrainingArguments`` make necessary.

    Args:
        installed: what the plan has changed.
        args: the ``TrainingArguments``.
        options: of the optimiser that is asked for.
        in_backward: whether it updates in the backward pass.

    Raises:
        ValueError: the trainer would copy or flatten what the plan has split, or the optimiser
            needs what a sharded model has not; or another rank has made another plan.
    """
    if installed.masked and getattr(args, "n_gpu", 1) > 1:
        raise ValueError(
            f"args.n_gpu is {args.n_gpu}: the trainer would copy the model to that many GPUs "
            "(torch.nn.DataParallel), which cannot copy what a plan has split: set "
            "CUDA_VISIBLE_DEVICES=0, or start one process a GPU (torchrun)"
        )
    _meet(installed, sharder(args), options, in_backward=in_backward)
    if not installed.sharded and getattr(args, "world_size", 1) > 1:
        # Of slices of other shapes DistributedDataParallel itself would fail, in other words.
        check_alike(Ranks.of(), installed.fingerprint, installed.entries, installed.frozen)
        installed.averages = True


def meet_accelerator(
    installed: Installed, options: Mapping[str, Any], *, in_backward: bool
) -> None:
    """Do what an ``Accelerator`` that was made makes necessary; as of :func:`meet_arguments`."""
    _meet(installed, sharder(), options, in_backward=in_backward)


def _meet(
    installed: Installed, by: str | None, options: Mapping[str, Any], *, in_backward: bool
) -> None:
    if by is None or installed.sharded:
        return
    if by != "FSDP2":
        raise ValueError(f"the model is about to be sharded by {by}, {FLATTENS}")
    asked = {n: options[n] for n in ("max_norm", "track_importance") if options.get(n)}
    asked |= {"in_backward": True} if in_backward else {}
    for name, value in asked.items():
        raise ValueError(
            f"{name} is {value}, must be left out: the model is about to be sharded by FSDP2, and "
            "each rank will hold its own rows alone. Clip with args.max_grad_norm; for "
            "in_backward=True shard the model before the plan is made"
        )
    single = [name for name, each in installed.entries.items() if each.single and each.partial]
    if single:
        raise ValueError(
            f"units has single weights of {single[0]!r}, and the model is about to be sharded by "
            "FSDP2, whose pieces are rows: choose units or rows, or train in one memory"
        )
    slices = installed.own_slices()
    await_sharding(installed)
    retire(slices)
