"""The part of a plan that makes optimisers, for loops and for trainers.

Example: of 0.3 B parameters 20 % train. Every optimiser that is made here holds these alone, so
that gradients and moments are a fifth of a dense run's. With ``in_backward=True`` there is at most
one gradient at a time (`ssah.training.optimising.in_backward`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ssah.compat.accelerate import sharder
from ssah.training.installing import Installed
from ssah.training.optimising.importance import UnitImportance, unit_importance
from ssah.training.optimising.in_backward import InBackwardAdamW, check_arguments
from ssah.training.optimising.optimizer import PlanAdamW, param_groups, rounding, trainer_options
from ssah.training.optimising.parallelism import meet_accelerator, meet_arguments
from ssah.units import DepthTwoModule


class Optimised:
    """The part of a plan that makes optimisers."""

    fingerprint: str
    modules: Mapping[str, DepthTwoModule]
    _installed: Installed

    def _check_open(self) -> None:
        raise NotImplementedError

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train, slices ``[trained, ...]``: for any optimiser of torch."""
        self._check_open()
        return (parameter for _, parameter in self._installed.parameters())

    def param_groups(self, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Parameter groups for any optimiser: norms and biases (one dimension) do not decay."""
        slices = self._installed.slices()
        return param_groups(self.parameters(), slices, self.fingerprint, weight_decay)

    def optimizer(
        self,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.01,
        in_backward: bool = False,
        **options: Any,
    ) -> PlanAdamW:
        """AdamW over what trains. The last optimiser that the plan has made is the one to use.

        Args:
            lr: learning rate, a float or a tensor ``[]``.
            weight_decay: decoupled; not of norms and biases.
            in_backward: update each slice in ``backward()``, as its gradient arrives, and free the
                gradient: see :class:`ssah.training.optimising.in_backward.InBackwardAdamW`.
            **options: of :class:`ssah_kernels.optim.MaskedAdamW`: betas, eps, state_dtype,
                rounding, seed, max_norm, track_importance. ``rounding`` is ``"stochastic"`` where
                a bfloat16 weight trains: to nearest, most steps of 1e-5 would change nothing.

        Raises:
            TypeError, ValueError: an option is wrong, or does not go with ``in_backward``.
        """
        self._check_open()
        meet_accelerator(self._installed, options, in_backward=in_backward)
        kind, kwargs = self._kind_and_kwargs(in_backward, {"lr": lr, **options}, weight_decay)
        return self._remembered(kind(**kwargs))

    def optimizer_cls_and_kwargs(
        self, args: Any, *, in_backward: bool = False, **options: Any
    ) -> tuple[type[PlanAdamW], dict[str, Any]]:
        """For ``optimizer_cls_and_kwargs=`` of Trainer, and of TRL's SFTTrainer and RewardTrainer.

        Args:
            args: the ``TrainingArguments``: learning rate, betas, epsilon and decay are taken
                from it. Clipping stays with the trainer (``max_grad_norm``).
            in_backward: as of :meth:`optimizer`; ``args`` must then ask for no clipping
                (``max_grad_norm=0``), no accumulation of gradients and no ``fp16``.
            **options: further ones of :class:`ssah_kernels.optim.MaskedAdamW`; ``rounding`` as in
                :meth:`optimizer`.

        Raises:
            ValueError: ``args`` asks for another optimiser than AdamW, or for what
                ``in_backward=True`` cannot do; for several GPUs in one process, FSDP1 or DeepSpeed;
                or other ranks have made other plans.
        """
        self._check_open()
        own = trainer_options(args) | options
        if in_backward:
            check_arguments(args, sharded=self._installed.sharded)
        meet_arguments(self._installed, args, options, in_backward=in_backward)
        self._installed.note_arguments(args)
        return self._kind_and_kwargs(in_backward, own, args.weight_decay)

    def optimizers(
        self, args: Any, *, in_backward: bool = False, **options: Any
    ) -> tuple[PlanAdamW, None]:
        """For ``optimizers=`` of every trainer of TRL. See also `ssah.training.prepare_trainer`.

        Arguments and errors as of :meth:`optimizer_cls_and_kwargs`; and ValueError where the
        trainer shards with FSDP2, since it takes no optimiser that was made before.
        """
        if not self._installed.sharded and sharder(args) == "FSDP2":
            raise ValueError(
                "args ask for FSDP2, under which no trainer takes optimizers=: make the trainer "
                "without, and set trainer.optimizer_cls_and_kwargs = "
                "plan.optimizer_cls_and_kwargs(args) before trainer.train()"
            )
        kind, kwargs = self.optimizer_cls_and_kwargs(args, in_backward=in_backward, **options)
        return self._remembered(kind(**kwargs)), None

    def importance(self, optimizer: Any = None) -> UnitImportance:
        """Importance of the trained units, accumulated inside the updates so far.

        Args:
            optimizer: by default the last one that stepped under this plan.

        Raises:
            RuntimeError: there is none, or it was made without ``track_importance=True``.
        """
        self._check_open()
        own = self._installed.optimizer(optimizer)
        return unit_importance(own.importance(), self._installed.slices(), self.modules)

    def _kind_and_kwargs(
        self, in_backward: bool, options: dict[str, Any], weight_decay: float
    ) -> tuple[type[PlanAdamW], dict[str, Any]]:
        single = next((s.name for s in self._installed.slices() if s.entries.single), None)
        if options.get("track_importance") and single is not None:
            raise ValueError(
                f"track_importance is True, and single weights of {single!r} train: importance is "
                "summed over rows of units; leave it out, or choose units"
            )
        kwargs = {
            "params": self.param_groups(weight_decay),
            **rounding(self.parameters()),
            **options,
        }
        if in_backward:
            return InBackwardAdamW, {**kwargs, "installed": self._installed}
        return PlanAdamW, kwargs

    def _remembered(self, optimizer: PlanAdamW) -> PlanAdamW:
        self._installed.last_optimizer = weakref.ref(optimizer)
        if not optimizer.in_backward:  # one that was made before would take its gradients
            self._installed.replace_update_hooks([])
        return optimizer
