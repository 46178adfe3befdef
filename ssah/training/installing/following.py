"""A plan that follows its model through the sharding of Trainer and accelerate (FSDP2).

accelerate's ``prepare(model, optimizer)`` cuts every parameter into pieces, and puts the piece of a
rank into the optimiser, in the place of the parameter of the same name. Example, a down projection
``[hidden, 4]`` of which the columns 1, 2 and 3 train, on two ranks:

    plan = freeze(model, units)           down_proj.weight_trained [3, hidden]
    plan.optimizer_cls_and_kwargs(args)   args say FSDP2: down_proj.weight [hidden, 4], whole again,
                                          of which the optimiser updates columns 1, 2 and 3
    trainer.train()                       accelerate: down_proj.weight, a DTensor, in both
    the first forward pass, or step       the plan takes over this rank's [hidden / 2, 4]

So the order does not matter: afterwards the plan is the one that is made on a sharded model.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ssah.distributed import Ranks
from ssah.training.installing.alike import check_alike
from ssah.training.installing.in_place import check_unmoved
from ssah.training.installing.installed import Installed
from ssah.training.installing.sharded import check_sharded, whole_digests


def await_sharding(installed: Installed) -> None:
    """Make what a plan has split whole again: the model is about to be sharded."""
    installed.unsplit()
    installed.sharded = installed.waiting = True

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        plan = own()
        if plan is not None and any(part is plan.model for part in module.modules()):
            follow(plan)

    # A hook of the model runs after FSDP's own, which has put other tensors in the places of its
    # parameters by then. Those of the process run before; they must keep no model alive.
    hook = register_module_forward_pre_hook(before)
    own = weakref.ref(installed, lambda _: hook.remove())
    installed.select([hook])


def follow(installed: Installed) -> None:
    """Take over this rank's pieces, if the model was sharded meanwhile; all ranks call this.

    Raises:
        ValueError: the ranks have made other plans, or sharded in a way that is not known.
        RuntimeError: a frozen weight is not, bit for bit, the one that the plan was made with.
    """
    ranks = Ranks.over(installed.model) if installed.waiting else None
    if ranks is None:
        return
    with ranks.agreeing():
        found = dict(installed.model.named_parameters())
        for name in installed.entries:
            if name not in found:
                raise ValueError(
                    f"parameter {name!r} has another name since the model was sharded, must keep "
                    "its own: leave FSDP's own activation_checkpointing and compiled layers out "
                    "(gradient_checkpointing=True in the arguments of the trainer wraps nothing)"
                )
            check_sharded(name, found[name])
    check_alike(ranks, installed.fingerprint, installed.entries)
    # Mixed precision has made float32 of bfloat16, which is exact: hashed are the bits from before.
    now = whole_digests(installed.model, installed.entries, ranks, installed.dtypes)
    with ranks.agreeing():
        if ranks.rank == 0:  # the others may have been given its weights
            check_unmoved(installed.frozen, now)
    installed.ranks, installed.waiting = ranks, False
    installed.frozen = installed.digests()  # from now on of this rank's rows
    installed.select()
