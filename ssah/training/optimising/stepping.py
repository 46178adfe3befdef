"""What an optimiser needs to train something under a plan: gradients, and state that fits.

Example: adapters are added after a plan was made, and peft switches ``requires_grad`` off for all
but them. An optimiser of the plan then steps, finds no gradient, and changes nothing: four epochs
pass, and the loss stays. Its first step raises instead.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.optim import Optimizer

# State that has an element for each of the parameter's, as optimisers of torch and of bitsandbytes
# call it. Their kernels run over it with the parameter's size, whatever its own is. Factored state
# (Adafactor's) and blocks' scales have other names and shapes, which are right.
_ELEMENTWISE = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "prev", "step_size", "exp_inf", "ax", "state1", "state2"),
}
_LIBRARIES = ("torch.optim.", "bitsandbytes.optim.")


def lost(n: int, of: int) -> RuntimeError:
    """The error of an optimiser of whose ``of`` parameters ``n`` train under no plan."""
    return RuntimeError(
        f"{n} of the optimiser's {of} parameters train under no plan in force: its plan was "
        "closed, or made for another model, or the model has other parameters in their place now. "
        "Make a plan, and the optimiser with plan.optimizer(), before the next step"
    )


def check_trains(params: Collection[Tensor]) -> None:
    """Refuse a step that would change nothing.

    Args:
        params: what the optimiser holds, of any shapes.

    Raises:
        RuntimeError: none of them has a gradient.
    """
    if any(p.grad is not None for p in params):
        return
    if any(p.requires_grad for p in params):
        why = (
            "the loss was computed with another model than the plan's, or backward() was not "
            "called on it: make the plan, its optimiser and the loss with one model"
        )
    else:
        why = (
            "all of them have requires_grad=False, which peft sets as it adds adapters: train "
            "adapters without a plan, or make the plan's optimiser with requires_grad on"
        )
    raise RuntimeError(
        f"none of the optimiser's {len(params)} parameters has a gradient, so that the step would "
        f"train nothing; {why}"
    )


def check_state(optimizer: Optimizer) -> None:
    """Refuse state that was saved for parameters of other shapes.

    Fused kernels would read and write beyond it.

    Raises:
        ValueError: a state tensor has another shape than its parameter.
    """
    kinds = type(optimizer).__mro__[: -len(Optimizer.__mro__)]  # without Optimizer and its bases
    if not any(kind.__module__.startswith(_LIBRARIES) for kind in kinds):
        return
    for p, state in optimizer.state.items():
        for name, value in state.items():
            wrong = isinstance(value, Tensor) and value.dim() and value.shape != p.shape
            if wrong and name in _ELEMENTWISE:
                raise ValueError(
                    f"the optimiser's {name} has shape {list(value.shape)} for a parameter of "
                    f"shape {list(p.shape)}: it was saved with other units, or without a plan. "
                    "Resume with the same plan, or start a new optimiser"
                )
