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
from dataclasses import dataclass, replace
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
    """Which entries of every expert train.

    Attributes:
        counts: how many of each expert.
        columns: int64 ``[experts, most]``, entries of each expert, those that train first.
        kept: int64 ``[trained]``, which rows of a gradient ``[experts * most, ...]`` of these
            entries the rows of the trained parameter are.
        whole: whether that is a gradient of all entries, in the model's order.
    """

    counts: tuple[int, ...]
    columns: Tensor
    kept: Tensor
    whole: bool

    @classmethod
    def of(cls, trains: Tensor) -> TrainedRows:
        """Of bool ``[experts, entries]``."""
        counts, entries = trains.sum(1), trains.shape[1]  # [experts]
        most = min(entries, -(-int(counts.max()) // _MULTIPLE) * _MULTIPLE)
        columns = (~trains).byte().argsort(stable=True, dim=1)[:, :most]
        whole = most > _GATHERED_SHARE * entries
        kept = trains if whole else torch.arange(most) < counts[:, None]
        return cls(tuple(counts.tolist()), columns, kept.flatten().nonzero()[:, 0], whole)

    def to(self, device: torch.device) -> TrainedRows:
        """These on ``device``."""
        return replace(self, columns=self.columns.to(device), kept=self.kept.to(device))

    def pick(self, x: Tensor, routing: Routing) -> Tensor:
        """What of ``x`` ``[pairs, entries]`` a gradient is made of: ``[pairs, most]``."""
        return x if self.whole else x.gather(1, self.columns[routing.expert])

    def gradient(self, left: Tensor, right: Tensor, routing: Routing) -> Tensor:
        """That of the trained rows, ``[trained, other]``, of picked ``[pairs, most]`` and
        ``[pairs, other]``."""
        if left.device.type != "cpu":
            return routing.gradient(left, right).flatten(0, 1).index_select(0, self.kept)
        value = left.new_empty(sum(self.counts), right.shape[1])
        pieces, columns = value.split(self.counts), self.columns
        for piece, own, (a, b) in zip(pieces, columns, routing.spans, strict=True):
            rows = left[a:b]  # [its pairs, most]
            rows = rows.index_select(1, own[: len(piece)]) if self.whole else rows[:, : len(piece)]
            torch.mm(rows.t(), right[a:b], out=piece)
        return value


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
        x = x.to(product_dtype(x))
        assert split.places is not None
        places = split.places.view(split.shape[0], -1)  # [experts, entries]
        if composed:
            matrices = split.assembled(self)[places]  # [experts, entries, other]
            out = routing.product(x, matrices if is_output else matrices.mT)
        else:
            trained = self.trained[leaf] = self.trained[leaf].to(x.device)
            parameter = self._parameters[split.names[0]]
            fixed = places, trained, routing, is_output
            out = _ExpertsProduct.apply(x, split.storage, parameter, *fixed)
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


def _product(x: Tensor, storage: Tensor, places: Tensor, routing: Routing, turned: bool) -> Tensor:
    """The rows of every expert times its matrix: ``[pairs, in]`` to ``[pairs, out]``.

    Args:
        x: ``[pairs, in]``.
        storage: ``[entries of all experts, other]``.
        places: int64 ``[experts, entries]``, the storage row of each entry of the model.
        routing: whose the pairs are.
        turned: whether entries are what goes in.
    """
    if x.device.type != "cpu":
        matrices = storage[places].to(x.dtype)  # [experts, entries, other]
        return routing.product(x, matrices if turned else matrices.mT)
    # Memory for one matrix is at hand in a cache; that for all would be new each time.
    out = x.new_empty(len(x), storage.shape[1] if turned else places.shape[1])
    for own, (a, b) in zip(places, routing.spans, strict=True):
        if b > a:
            matrix = storage.index_select(0, own).to(x.dtype)  # [entries, other]
            torch.mm(x[a:b], matrix if turned else matrix.t(), out=out[a:b])
    return out


class _ExpertsProduct(torch.autograd.Function):
    """The rows of every expert times its matrix, with gradients for them and for what trains."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [pairs, in]
        storage: Tensor,  # [entries, other]
        parameter: Tensor,  # [trained, other], whose values the storage has
        places: Tensor,  # int64 [experts, entries]
        trained: TrainedRows,
        routing: Routing,
        is_output: bool,  # whether this is B, of which entries are what goes in
    ) -> Tensor:
        ctx.places, ctx.trained, ctx.routing, ctx.is_output = places, trained, routing, is_output
        # What B's gradient needs of x is a part of it.
        kept = trained.pick(x, routing) if is_output else x
        # The first two are saved so that a change of them before the backward pass is noticed.
        ctx.save_for_backward(storage, parameter, kept)
        return _product(x, storage, places, routing, is_output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        storage, parameter, kept = ctx.saved_tensors
        (grad,), routing, trained = grads, ctx.routing, ctx.trained  # grad: [pairs, out]
        grad_x = value = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, storage, ctx.places, routing, not ctx.is_output)
        if ctx.needs_input_grad[2]:
            entries = kept if ctx.is_output else trained.pick(grad, routing)
            value = trained.gradient(entries, grad if ctx.is_output else kept, routing)
            value = value.to(parameter.dtype)
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
            if leaf in (up_name(module), DOWN):
                trained[leaf] = TrainedRows.of(each.trains.view(len(original), -1))
            tensors[leaf] = SplitTensor.of(
                leaf, original, each.dims, trained_first(each.trains), each.trains
            )
    installed = MaskedExperts.install(module, tensors)
    assert isinstance(installed, MaskedExperts)
    installed.trained = trained
    return installed
