"""An optimiser whose updates happen inside ``backward()``, so that gradients need no memory.

Example: three layers with 100 MB of gradients each. Ordinarily all 300 MB are there when the step
begins. Here the backward pass makes the gradient of layer 3, layer 3 is updated and its gradient
is freed, and only then the gradient of layer 2 is made: 100 MB are enough, and after
``backward()`` no gradient is there at all.

    optimizer = plan.optimizer(lr=2e-5, in_backward=True)
    model(**batch).loss.backward()      # updates each slice as its gradient arrives
    optimizer.step()                    # ends the step, and sees that there was an update

An update that has happened cannot wait for what comes later: the gradients of one backward pass are
those of one step. The norm of all gradients is known after the last of them, so that clipping goes
through the graph twice (`InBackwardAdamW.clipped_backward`): first for the norm, then to update.

Source: LOMO (Lv et al., arXiv 2306.09782), which clips by two passes as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ssah.compat.modules import active_ddp
from ssah.training.installing import Installed
from ssah.training.optimising.active import check_step
from ssah.training.optimising.optimizer import PlanAdamW
from ssah.training.optimising.stepping import check_trains
from ssah_kernels import ops
from ssah_kernels.optim.base import Entry
from ssah_kernels.optim.calls import Call
from ssah_kernels.sharded import is_sharded


class InBackwardAdamW(PlanAdamW):
    """`PlanAdamW` that updates every parameter as its gradient arrives, and frees the gradient.

    Rates, decay, groups, state, checkpoints and bits are those of `PlanAdamW`. One thing differs:
    noise of stochastic rounding is drawn as if each parameter had a group of its own.

    Args:
        params: parameters or groups, as of `PlanAdamW`.
        installed: what the plan has changed in its model.
        **options: of `PlanAdamW`, without ``max_norm``.

    Raises:
        ValueError: ``max_norm`` is given, or an option of `PlanAdamW` is wrong.
    """

    in_backward = True

    def __init__(self, params: Iterable[Any], *, installed: Installed, **options: Any) -> None:
        self._entries: dict[int, Entry] = {}  # by the id of the parameter, of this backward pass
        self._updated: set[int] = set()  # ids of what was updated since the last step
        self._norms: list[Tensor] | None = None  # while gradients are measured: float64 [] each
        self._clip_coef: Tensor | None = None  # of the second pass, float64 []
        self._installed, self._is_made = installed, False
        super().__init__(params, **options)
        self._is_made = True  # nothing is refused from here on: only now the model is changed
        forward = _while_alive(self._before_forward)
        installed.replace_update_hooks([installed.model.register_forward_pre_hook(forward)])
        for group in self.param_groups:
            self._hang_on(group["params"])

    def _hang_on(self, params: Iterable[Tensor]) -> None:
        hook = _while_alive(self._arrived)
        self._installed.update_hooks += [p.register_post_accumulate_grad_hook(hook) for p in params]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of `PlanAdamW`; a group with ``max_norm`` is refused, with ValueError."""
        max_norm = param_group.get("max_norm", self.defaults["max_norm"])
        if max_norm is not None:
            raise ValueError(
                f"max_norm is {max_norm}; it must be None with in_backward=True, since the norm of "
                "all gradients is known after the first updates only: call "
                "optimizer.clipped_backward(loss, max_norm) in the place of loss.backward()"
            )
        super().add_param_group(param_group)
        if self._is_made:
            self._hang_on(self.param_groups[-1]["params"])

    # ------------------------------------------------------------------------- while gradients come

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Refuse DistributedDataParallel: it averages gradients that would be used up by then."""
        if not torch.compiler.is_compiling() and active_ddp() is not None:
            raise RuntimeError(
                "the model runs inside DistributedDataParallel, which averages gradients over "
                "ranks after an optimiser with in_backward=True has used them: use "
                "plan.optimizer() without in_backward, or shard the model with fully_shard before "
                "the plan is made"
            )

    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        """Update ``p``, whose gradient is complete, or measure the gradient; then free it."""
        try:
            if not self._entries:
                # What a step is looked at for, before anything changes. While a sharded model
                # computes, other tensors are in the places of its parameters: `step` looks at it.
                if not self._installed.sharded:
                    check_step(self, (), {})
                self._entries = {id(entry[2]): entry for entry in self.entries()}
            self._check_gradient(p)
            if self._norms is not None:
                self._norms.append(self._norm(p))
                return
            self._updated.add(id(p))
            self.update_entries([self._entries[id(p)]])
        finally:
            p.grad = None

    def _check_gradient(self, p: Tensor) -> None:
        assert p.grad is not None
        if p.grad.requires_grad:
            raise RuntimeError(
                f"the gradient of {self._name(p)!r} has a graph (create_graph=True), through "
                "parameters that an update would change: use plan.optimizer() without in_backward"
            )
        if id(p) in self._updated:
            raise RuntimeError(
                f"{self._name(p)!r} has a second gradient since the last optimizer.step(), and was "
                "updated with the first: with in_backward=True each backward() is a step, so call "
                "optimizer.step() after each. To accumulate gradients over several passes, or to "
                "use a graph twice, use plan.optimizer() without in_backward"
            )

    def _norm(self, p: Tensor) -> Tensor:
        """The norm of its trained gradient, float64 []."""
        _, _, _, index, dim = self._entries[id(p)]
        assert p.grad is not None
        assert isinstance(dim, int)  # a pair is of sharded experts, which are not clipped here
        return ops.masked_grad_norm([p.grad], [index], [dim])

    def _name(self, p: Tensor) -> str:
        """What the model calls ``p``."""
        return next((name for name, own in self._installed.parameters() if own is p), "a parameter")

    # ---------------------------------------------------------------------------------- the steps

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End a step whose updates have happened in ``backward()``; returns the closure's loss.

        Raises:
            RuntimeError: nothing was updated since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._updated:
            check_trains([p for group in self.param_groups for p in group["params"]])
            raise RuntimeError(
                "nothing was updated since the last optimizer.step(), though there are gradients: "
                "they were put there by hand, or another optimiser with in_backward=True was made "
                "since. Gradients must come from backward()"
            )
        self._end()
        return loss

    def _end(self) -> None:
        self._updated.clear()
        self._entries.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of `PlanAdamW`; a step that an error has cut off is forgotten."""
        super().load_state_dict(state_dict)
        self._end()

    def clipped_backward(self, loss: Tensor, max_norm: float) -> Tensor:
        """``loss.backward()`` with the norm of all gradients together clipped to ``max_norm``.

        The graph is gone through twice, first to measure: a step takes the time of a second
        backward pass, and no gradient is kept.

        Args:
            loss: ``[]``.
            max_norm: greater than 0.

        Returns:
            the norm before clipping, float64 ``[]``, as ``torch.nn.utils.clip_grad_norm_`` does.

        Raises:
            ValueError: ``max_norm`` is not positive, or the model is sharded.
            RuntimeError: as of a backward pass and of a step.
        """
        if isinstance(max_norm, bool) or not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm!r}; it must be a number greater than 0")
        params = [p for group in self.param_groups for p in group["params"]]
        if any(is_sharded(p) for p in params):
            raise ValueError(
                "the model is sharded, and each rank has the norm of its own rows alone: use "
                "plan.optimizer() without in_backward, and torch.nn.utils.clip_grad_norm_"
            )
        self._norms = []
        try:
            # Not computed again: dropout would make another graph, of other gradients.
            loss.backward(retain_graph=True)
            norms = self._norms
        finally:
            self._norms = None
        if not norms:
            check_trains(params)
        # Added up where the loss is; a model on several devices has norms on each.
        norm = torch.stack([each.to(loss.device) for each in norms]).norm()
        self._clip_coef = (max_norm / (norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_ has it
        try:
            loss.backward()
        finally:
            self._clip_coef = None
        return norm

    def _clip_coefs(self, calls: list[tuple[dict[str, Any], Call]]) -> list[Tensor | None]:
        coef = self._clip_coef
        return [None if coef is None else coef.to(call.params[0].device) for _, call in calls]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler reads this as it steps, and would go on with gradients that are gone.
        raise RuntimeError(
            "torch.amp.GradScaler steps with an optimiser made with in_backward=True, whose "
            "updates have been made with scaled gradients: train in bfloat16, which needs no "
            "scaling, or use plan.optimizer() without in_backward"
        )


def _while_alive(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that calls a method of an optimiser for as long as somebody holds the optimiser."""
    weak = weakref.WeakMethod(method)

    def hook(*args: Any) -> None:
        alive = weak()
        if alive is not None:
            alive(*args)

    return hook


def check_arguments(args: Any, *, sharded: bool) -> None:
    """Refuse ``TrainingArguments`` under which a trainer would handle gradients that are gone.

    Args:
        args: the ``TrainingArguments``.
        sharded: whether the model is.

    Raises:
        ValueError: the argument is named.
    """
    ranks = getattr(args, "world_size", 1)
    wrong = {
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, 1),
        # None and 0 mean the same: no clipping.
        "max_grad_norm": (args.max_grad_norm or 0.0, 0.0),
        "fp16": (args.fp16, False),
        "world_size": (ranks, ranks if sharded else 1),
    }
    why = {
        "gradient_accumulation_steps": "each backward pass is a step; raise "
        "per_device_train_batch_size",
        "max_grad_norm": "the trainer would find no gradients to clip; in a loop of your own "
        "optimizer.clipped_backward(loss, max_norm) clips exactly",
        "fp16": "its scaling of the loss looks at all gradients before the step; set bf16=True",
        "world_size": "DistributedDataParallel averages gradients after the updates; shard the "
        "model with fully_shard before the plan is made",
    }
    for name, (value, needed) in wrong.items():
        if value != needed:
            raise ValueError(
                f"args.{name} is {value}, must be {needed} with in_backward=True: {why[name]}. Or "
                "leave in_backward out"
            )
