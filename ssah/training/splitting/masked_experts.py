"""Routed experts of which only some units train.

Of every parameter ``[experts, ...]`` the trained rows of all experts lie first in storage, and are
one parameter. Example: two experts of three units. Unit 0 of the first trains, and units 1 and 2 of
the second:

    storage row      0    1    2    3    4    5
    expert.unit     0.0  1.1  1.2  0.1  0.2  1.0

The forward pass puts the matrices of one layer together, as the model has them, for one product of
all experts; the backward pass does so again, so that no copy is kept. The gradient of the weights
is made for the units that train: of the most that any expert trains, of every expert, since a
grouped product gives all experts as many rows. Above, two rows of each: one of the first is thrown
away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssah.compat.modules import is_transformed
from ssah.compat.transformers import expert_gate
from ssah.training.entries import Entries
from ssah.training.splitting.projection import MaskedProjection
from ssah.training.splitting.split_tensor import SplitTensor, restored
from ssah.training.splitting.storage_order import trained_first
from ssah.units import DOWN, Routing, product_dtype, up_name

# Beyond this share of an expert's entries a gradient of all costs less than to gather some.
_GATHERED_SHARE = 0.75
_MULTIPLE = 8  # entries: 16 bytes of bfloat16, which grouped products ask for


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """Where the trained entries of every expert stand in the gradient of a weight.

    Attributes:
        columns: int64 ``[experts, most]``, entries of each expert, those that train first; None:
            the gradient is made for all of them.
        kept: int64 ``[trained]``, which rows of the gradient ``[experts * most, ...]`` the rows of
            the trained parameter are.
    """

    columns: Tensor | None
    kept: Tensor

    @classmethod
    def of(cls, trains: Tensor) -> TrainedRows:
        """Of bool ``[experts, entries]``."""
        counts = trains.sum(1)  # [experts]
        most = -(-int(counts.max()) // _MULTIPLE) * _MULTIPLE
        if most > _GATHERED_SHARE * trains.shape[1]:
            return cls(None, trains.flatten().nonzero()[:, 0])
        columns = (~trains).byte().argsort(stable=True, dim=1)[:, :most]
        kept = torch.arange(most) < counts[:, None]  # [experts, most]
        return cls(columns, kept.flatten().nonzero()[:, 0])

    def to(self, device: torch.device) -> TrainedRows:
        """These on ``device``."""
        columns = None if self.columns is None else self.columns.to(device)
        return TrainedRows(columns, self.kept.to(device))

    def pick(self, x: Tensor, routing: Routing) -> Tensor:
        """The columns of the entries that the gradient is made for: ``[pairs, most]``."""
        return x if self.columns is None else x.gather(1, self.columns[routing.expert])


class MaskedExperts(MaskedProjection):
    """Mixed into the class of experts whose units train in part; see :func:`split_experts`.

    Attributes:
        trained: leaf -> where its trained entries stand.
    """

    trained: dict[str, TrainedRows]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """As the class that this is mixed into.

        Args:
            x: ``[tokens, hidden]``.
            chosen: int64 ``[tokens, top_k]``, the experts of each token.
            weights: ``[tokens, top_k]``, theirs in the sum.

        Returns:
            ``[tokens, hidden]``.
        """
        self.given_out.check()
        # torch.func knows no function like the one below, and lent slices are not to be kept.
        composed = self.lent or is_transformed()
        if not composed:
            self.sync()
        routing = Routing.of(chosen, self.split_tensors[DOWN].shape[0])
        rows = x.to(product_dtype(x))[routing.token]  # [pairs, hidden]
        a = expert_gate(self)(self._product(up_name(self), rows, routing, composed))
        out = self._product(DOWN, a, routing, composed)  # [pairs, hidden]
        return routing.weighed(out, weights).to(x.dtype)

    def _product(self, leaf: str, x: Tensor, routing: Routing, composed: bool) -> Tensor:
        """A or B of every expert with its bias: ``[pairs, in]`` to ``[pairs, out]``."""
        split, is_output = self.split_tensors[leaf], leaf == DOWN
        assert split.places is not None
        if composed:
            rows = split.assembled(self)  # [entries, ...]
            out = routing.product(x, _matrices(rows, split.places, len(routing.ends), is_output))
        else:
            trained = self.trained[leaf] = self.trained[leaf].to(x.device)
            parameter = self._parameters[split.names[0]]
            fixed = split.places, trained, routing, is_output
            out = _ExpertsProduct.apply(x.to(product_dtype(x)), split.storage, parameter, *fixed)
        if not self.has_bias:
            return out
        return out + self._bias(f"{leaf}_bias")[routing.expert].to(out.dtype)

    def _bias(self, leaf: str) -> Tensor:
        """A bias of every expert, ``[experts, out]``, as autograd follows it."""
        if leaf not in self.split_tensors:  # B's, which belongs to no unit
            return self._parameters[leaf]  # type: ignore[return-value]
        split = self.split_tensors[leaf]
        assert split.places is not None
        return split.assembled(self)[split.places].view(split.shape)

    def uninstall(self) -> None:
        """The ordinary experts again, with the original parameters and the present values."""
        super().uninstall()
        del self.trained


def _matrices(storage: Tensor, places: Tensor, n_experts: int, is_output: bool) -> Tensor:
    """The matrices of all experts in the model's order, ``[experts, in, out]``; a copy.

    Args:
        storage: ``[entries, other]``.
        places: int64 ``[entries]``, the storage row of each original entry.
        n_experts: how many.
        is_output: whether this is B, of which entries are columns.
    """
    matrices = storage.index_select(0, places).unflatten(0, (n_experts, -1))
    return matrices if is_output else matrices.mT


class _ExpertsProduct(torch.autograd.Function):
    """The rows of every expert times its matrix, with gradients for them and for what trains."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [pairs, in]
        storage: Tensor,  # [entries, other]
        parameter: Tensor,  # [trained, other], whose values the storage has
        places: Tensor,  # int64 [entries]
        trained: TrainedRows,
        routing: Routing,
        is_output: bool,
    ) -> Tensor:
        ctx.fixed = places, len(routing.ends), is_output
        ctx.trained, ctx.routing, ctx.is_output = trained, routing, is_output
        # What B's gradient needs of x is a part of it.
        kept = trained.pick(x, routing) if is_output else x
        # The first two are saved so that a change of them before the backward pass is noticed.
        ctx.save_for_backward(storage, parameter, kept)
        return routing.product(x, _matrices(storage, *ctx.fixed).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        storage, parameter, kept = ctx.saved_tensors
        (grad,), routing, trained = grads, ctx.routing, ctx.trained  # grad: [pairs, out]
        grad_x = value = None
        if ctx.needs_input_grad[0]:
            grad_x = routing.product(grad, _matrices(storage, *ctx.fixed).mT.to(grad.dtype))
        if ctx.needs_input_grad[2]:
            left = kept if ctx.is_output else trained.pick(grad, routing)
            every = routing.gradient(left, grad if ctx.is_output else kept)
            # [experts, most, other] -> [trained, other]
            value = every.flatten(0, 1).index_select(0, trained.kept).to(parameter.dtype)
        return grad_x, None, value, None, None, None, None


def split_experts(module: nn.Module, entries: Mapping[str, Entries]) -> MaskedExperts:
    """Split the parameters of the experts of one layer, in place.

    Args:
        module: the experts.
        entries: leaf -> its entries, of which some train and some do not.
    """
    tensors: dict[str, SplitTensor] = {}
    trained: dict[str, TrainedRows] = {}
    with restored(tensors):
        for leaf, each in entries.items():
            original = getattr(module, leaf)  # [experts, ...]
            trained[leaf] = TrainedRows.of(each.trains.view(len(original), -1))
            tensors[leaf] = SplitTensor.of(
                leaf, original, each.dims, trained_first(each.trains), each.trains
            )
    installed = MaskedExperts.install(module, tensors)
    assert isinstance(installed, MaskedExperts)
    installed.trained = trained
    return installed
