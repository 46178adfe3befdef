"""What is looked at before a planned model runs: that it is whole, and the same on every rank.

Both can only go wrong after the plan was made. ``fully_shard``, as Trainer and accelerate apply it,
replaces the trained slices by pieces of them, and offloading takes them away.
DistributedDataParallel averages gradients by their position, so that with other units on each rank
the gradient of unit 3 would go to unit 7.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ssah.compat.accelerate import offloading_hook
from ssah.compat.modules import active_ddp, takes_over
from ssah.distributed import Ranks
from ssah.training.splitting import MaskedProjection, replaced_slices


class ForwardCheck:
    """A hook on the model of a plan.

    Args:
        masked: name -> projection that is split; what is split later is looked at too.
        fingerprint: of the plan.
        frozen: hashes of what is frozen.
    """

    def __init__(
        self, masked: Mapping[str, MaskedProjection], fingerprint: str, frozen: Mapping[str, str]
    ) -> None:
        self.masked, self.fingerprint = masked, fingerprint
        self.frozen = hashlib.sha256(json.dumps(sorted(frozen.items())).encode()).hexdigest()
        self.compared = False

    def hang_on(self, model: nn.Module) -> RemovableHandle:
        """Look before each forward pass of ``model`` from now on."""
        return model.register_forward_pre_hook(self._check)

    def _check(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise where the model must not run.

        Raises:
            RuntimeError: others have taken its slices away.
            ValueError: its ranks train or freeze different things; on every rank.
        """
        if torch.compiler.is_compiling():
            return  # the compiler knows no process group
        lent = next((module for module in self.masked.values() if module.lent), None)
        if lent is not None and (takes_over(model) or offloading_hook(lent) is not None):
            raise replaced_slices(lent)
        ddp = None if self.compared else active_ddp()
        if ddp is not None:
            told = Ranks.of(ddp.process_group).tell([self.fingerprint, self.frozen])
            _check_alike("trains other units", [each[0] for each in told])
            _check_alike("has other frozen weights", [each[1] for each in told])
            self.compared = True


def _check_alike(what: str, told: Collection[str]) -> None:
    """Raise ValueError unless every rank has told the same."""
    first, *_ = told
    other = [rank for rank, each in enumerate(told) if each != first]
    if other:
        raise ValueError(
            f"rank {other[0]} {what} than rank 0 does: under DistributedDataParallel they must "
            "be the same on every rank. Draw units with one seed, or load them from one file, and "
            "make the plan on equal weights"
        )
