"""What is looked at before a planned model runs: that it is whole, and the same on every rank.

Both can only go wrong after the plan was made. ``fully_shard``, as Trainer and accelerate apply it,
replaces the trained slices by pieces of them, and offloading takes them away.
What DistributedDataParallel wraps is compared over the ranks (`ssah.training.installing.alike`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ssah.compat.accelerate import offloading_hook, sharder
from ssah.compat.modules import active_ddp, takes_over
from ssah.distributed import Ranks
from ssah.training.entries import Entries
from ssah.training.installing.alike import check_alike
from ssah.training.splitting import MaskedProjection, replaced_slices

FLATTENS = (
    "which flattens what a plan has split: use FSDP2 (fsdp_version: 2), or "
    "DistributedDataParallel (torchrun without a sharding plugin)"
)


class Checked(Protocol):
    """What is read here of what a plan has changed, see `ssah.training.installing.Installed`."""

    masked: dict[str, MaskedProjection]
    fingerprint: str
    entries: Mapping[str, Entries]
    frozen: dict[str, str]
    averages: bool


class ForwardCheck:
    """A hook on the model of a plan.

    Args:
        plan: what it has changed; what is split later is looked at too.
    """

    def __init__(self, plan: Checked) -> None:
        self.plan = plan
        self.compared = self.looked = False

    def hang_on(self, model: nn.Module) -> RemovableHandle:
        """Look before each forward pass of ``model`` from now on."""
        return model.register_forward_pre_hook(self._check)

    def _check(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise where the model must not run.

        Raises:
            RuntimeError: others have taken its slices away, DeepSpeed runs it, or each rank would
                train by itself.
            ValueError: its ranks train or freeze different things; on every rank.
        """
        if torch.compiler.is_compiling():
            return  # the compiler knows no process group
        if not self.looked:
            if sharder() == "DeepSpeed":
                raise RuntimeError(f"the model runs under DeepSpeed (ZeRO), {FLATTENS}")
            self.looked = True
        lent = next((module for module in self.plan.masked.values() if module.lent), None)
        if lent is not None and (takes_over(model) or offloading_hook(lent) is not None):
            raise replaced_slices(lent)
        if self.compared:
            return
        ddp = active_ddp()
        if ddp is not None:
            ranks = Ranks.of(ddp.process_group)
            check_alike(ranks, self.plan.fingerprint, self.plan.entries, self.plan.frozen)
            self.compared = True
        elif self.plan.averages and model.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the trainer has not wrapped the model in DistributedDataParallel, so that each "
                "rank would train by itself: accelerate takes a model that was evaluated for one "
                "that it has wrapped already. Call trainer.evaluate() after training, or delete "
                "model._is_accelerate_prepared in between"
            )
