"""A pull towards weights that the training has been at, as a term of the loss.

With w what trains and a the anchor, the weights at an earlier update:

    loss + rho / 2 |w - a|^2        gradient + rho (w - a)

Example: w = 3, a = 1 and rho = 0.5 add 1 to the loss and to the gradient. The gradient alone is
changed, before it is clipped; the loss that is logged is without the term. Source: Huang et al.,
NeurIPS 2024, arXiv 2405.18641 (Lisa), where the anchor is what the other of two tasks has left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ssah.compat.trainer import TrainerCallback


class ProximalCallback(TrainerCallback):
    """Adds rho / 2 |w - a|^2 to the loss of a ``transformers.Trainer``, under a plan or not.

    Anchors are one more copy of what trains.

    Args:
        rho: how strong the pull is.
        renewed: says of a number of updates done whether the weights are the anchor from then on;
            those before the first update are one in any case. None: they stay the only one.
        start: share of all updates that are without the pull.
    """

    def __init__(
        self, rho: float, renewed: Callable[[int], bool] | None = None, start: float = 0.0
    ) -> None:
        self.rho, self.start = rho, start
        self._renewed = renewed or (lambda step: step == 0)
        self._factor = 0.0  # of the difference in the gradient of a backward pass
        self._parameters: list[nn.Parameter] = []
        self._anchors: list[Tensor] = []
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse, with ValueError, training in float16, whose gradients are scaled."""
        if args.fp16:
            raise ValueError(
                "fp16 is True; it must be False with ProximalCallback, as gradients are scaled "
                "there and the pull would not be: train with bf16=True"
            )
        self._parameters = [p for p in kwargs["model"].parameters() if p.requires_grad]
        # Hooks see a gradient before it is clipped, and before an optimiser that steps within the
        # backward pass does. Callbacks come after both.
        self._hooks = [p.register_hook(self._pulled(i)) for i, p in enumerate(self._parameters)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the anchor, where it is time."""
        if not self._anchors or self._renewed(state.global_step):
            self._anchors = [p.detach().clone() for p in self._parameters]
        pulls = state.global_step >= self.start * state.max_steps
        # An update may take several backward passes, whose gradients are added up.
        self._factor = self.rho / args.gradient_accumulation_steps if pulls else 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the model go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._parameters, self._anchors = [], [], []

    def _pulled(self, i: int) -> Callable[[Tensor], Tensor | None]:
        def add(grad: Tensor) -> Tensor | None:
            if not self._factor:
                return None
            return grad + self._factor * (self._parameters[i].detach() - self._anchors[i])

        return add
