"""Routed experts of which only some units train.

An expert is the sum of two smaller ones, that of its trained and that of its frozen units:

    B sigma(A x) = B_t sigma(A_t x) + B_f sigma(A_f x)

since a unit's activation depends on its own row of A alone. Of every parameter ``[experts, ...]``
the trained rows of all experts lie first in storage, and are one parameter; autograd does the rest.
Example: two experts of three units. Unit 0 of the first trains, and units 1 and 2 of the second:

    storage row      0    1    2    3    4    5
    expert.unit     0.0  1.1  1.2  0.1  0.2  1.0        trained = [1, 2] units of each expert
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from ssah.compat.modules import has_hooks
from ssah.compat.transformers import expert_gate
from ssah.training.entries import Entries
from ssah.training.splitting.projection import MaskedProjection
from ssah.training.splitting.split_tensor import SplitTensor, restored
from ssah.training.splitting.storage_order import trained_first
from ssah.units import DOWN, run_routed, up_name


class MaskedExperts(MaskedProjection):
    """Mixed into the class of experts whose units train in part; see :func:`install`.

    Attributes:
        trained: leaf -> how many entries of each expert train.
    """

    trained: dict[str, list[int]]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """As the class that this is mixed into.

        Args:
            x: ``[tokens, hidden]``.
            chosen: int64 ``[tokens, top_k]``, the experts of each token.
            weights: ``[tokens, top_k]``, theirs in the sum.

        Returns:
            ``[tokens, hidden]``.
        """
        check_no_hooks(type(self).__name__, self)
        self.given_out.check()
        up = up_name(self)
        matrices, outputs = self._halves(up), self._halves(DOWN)
        biases = self._halves(f"{up}_bias") if self.has_bias else None
        shifts = self._parameters[f"{DOWN}_bias"].unbind() if self.has_bias else None  # type: ignore[union-attr]
        product = expert_gate(self)

        def run(token: Tensor, expert: int) -> Tensor:  # token: int64 [own tokens]
            out = 0 if shifts is None else shifts[expert]  # [hidden], once for both halves
            for half in range(2):
                matrix, output = matrices[expert][half], outputs[expert][half]
                if len(output):  # an expert may train whole, or not at all
                    bias = None if biases is None else biases[expert][half]
                    hidden = product(F.linear(x[token], matrix, bias))  # [own tokens, units]
                    out = hidden @ output + out  # [own tokens, hidden]
            assert isinstance(out, Tensor)
            return out

        return run_routed(run, x, chosen, weights, len(outputs))

    def uninstall(self) -> None:
        """The ordinary experts again, with the original parameters and the present values."""
        super().uninstall()
        del self.trained

    def _halves(self, leaf: str) -> list[tuple[Tensor, Tensor]]:
        """The trained and the frozen rows of every expert, unit-major ``[units, ...]`` each."""
        split, counts = self.split_tensors[leaf], self.trained[leaf]
        parameter = self._parameters[split.names[0]]
        assert parameter is not None
        rest = split.storage[sum(counts) :]
        size = len(split.storage) // len(counts)  # units of one expert
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


def split_experts(module: nn.Module, entries: Mapping[str, Entries]) -> MaskedExperts:
    """Split the parameters of the experts of one layer, in place.

    Args:
        module: the experts.
        entries: leaf -> its entries, of which some train and some do not.
    """
    tensors: dict[str, SplitTensor] = {}
    counts: dict[str, list[int]] = {}
    with restored(tensors):
        for leaf, each in entries.items():
            original = getattr(module, leaf)  # [experts, ...]
            counts[leaf] = each.trains.view(len(original), -1).sum(1).tolist()
            tensors[leaf] = SplitTensor.of(
                leaf, original, each.dims, trained_first(each.trains), each.trains
            )
    installed = MaskedExperts.install(module, tensors, moves_channels=True)
    assert isinstance(installed, MaskedExperts)
    installed.trained = counts
    return installed
