"""Routed experts of which only some units train.

An expert is the sum of two smaller ones, that of its trained and that of its frozen units:
B sigma(A x) = B_t sigma(A_t x) + B_f sigma(A_f x). Of every tensor the trained rows of all experts
lie first in storage (`ssah.training.split_tensor`) and are one parameter; autograd does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssah.compat.modules import has_hooks
from ssah.compat.transformers import expert_gate
from ssah.training.masked_linear import MaskedProjection
from ssah.training.split_tensor import Slot, restored
from ssah.units import DOWN, run_routed, up_name

__all__ = ["MaskedExperts", "check_no_hooks", "install"]


class MaskedExperts(MaskedProjection):
    """Mixed into the class of experts whose units train in part; see :func:`install`.

    Attributes:
        trained: leaf -> how many entries of each expert train.
    """

    trained: dict[str, list[int]]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """As the class that this is mixed into: ``[tokens, hidden]``."""
        check_no_hooks(type(self).__name__, self)
        self.sync()
        up = up_name(self)
        matrices, outputs = self._halves(up), self._halves(DOWN)
        biases = self._halves(f"{up}_bias") if self.has_bias else None
        shifts = self._parameters[f"{DOWN}_bias"].unbind() if self.has_bias else None  # type: ignore[union-attr]
        product = expert_gate(self)

        def run(token: Tensor, expert: int) -> Tensor:
            out = 0 if shifts is None else shifts[expert]
            for half in range(2):
                matrix, output = matrices[expert][half], outputs[expert][half]
                if len(output):
                    bias = None if biases is None else biases[expert][half]
                    out = product(F.linear(x[token], matrix, bias)) @ output + out
            assert isinstance(out, Tensor)
            return out

        return run_routed(run, x, chosen, weights, len(outputs))

    def uninstall(self) -> None:
        """The ordinary experts again, with the original parameters and the present values."""
        super().uninstall()
        del self.trained

    def _halves(self, leaf: str) -> list[tuple[Tensor, Tensor]]:
        """The trained and the frozen rows of every expert, unit-major."""
        slot, counts = self.slots[leaf], self.trained[leaf]
        parameter = self._parameters[slot.names[0]]
        assert parameter is not None
        rest = slot.storage[sum(counts) :]
        size = len(slot.storage) // len(counts)
        frozen = rest.split([size - count for count in counts])
        return list(zip(parameter.split(counts), frozen, strict=True))


def check_no_hooks(name: str, module: nn.Module) -> None:
    """Refuse hooks inside experts: each is run in two halves, so that channels have other numbers.

    Args:
        name: of the experts, for the message.
        module: the experts of one layer.

    Raises:
        RuntimeError: something hangs inside.
    """
    for part in list(module.modules())[1:]:
        if has_hooks(part):
            raise RuntimeError(
                f"a hook hangs on the {type(part).__name__} inside the experts {name}, of which "
                "only some units train: a plan runs each expert in two halves, so that the hook "
                "would take one channel for another. Remove it while there is a plan"
            )


def install(
    module: nn.Module, dims: Mapping[str, tuple[int, ...]], trains: Mapping[str, Tensor]
) -> MaskedExperts:
    """Split the parameters of experts, in place.

    Args:
        module: the experts of one layer.
        dims: leaf -> the dimensions that run over experts and over entries of one.
        trains: leaf -> bool ``[entries of all experts]``; some train and some do not.
    """
    slots: dict[str, Slot] = {}
    counts: dict[str, list[int]] = {}
    with restored(slots):
        for leaf, mask in trains.items():
            order = torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]])
            original = getattr(module, leaf)
            counts[leaf] = mask.view(len(original), -1).sum(1).tolist()
            slots[leaf] = Slot.of(leaf, original, dims[leaf], order, mask)
    plain = type(module)
    masked = type(f"Masked{plain.__name__}", (MaskedExperts, plain), {})
    MaskedProjection.install(module, slots, masked, is_output=False)
    assert isinstance(module, MaskedExperts)
    module.trained = counts
    return module
