"""Watching the activation that enters every B: its moments, and its product with its gradient.

Of a routed expert these are taken over the tokens that chose it, before the routing weight.

    x ``[rows, length, hidden]`` -> A, sigma -> a ``[rows, length, n_units]`` -> B
                                                |
                                                moments of a; in the backward pass a * dL/da

Positions that are not needed (padding that nobody sees) may be left out of A and of the product:
``[rows, length, hidden]`` becomes ``[n, hidden]``, and the output is put back among zeros. Example:
a row of length 4 with 1 padding position has needed = (0, 1, 2), and the output's last row is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssah.attribution.batches import Batch
from ssah.attribution.expert_sums import add_gradients_, add_moments_
from ssah.attribution.sums import ExpertSums, Sums
from ssah.compat.modules import has_hooks
from ssah.models import at_hand, replaced_forward, runs_own_forward, to_device
from ssah.units import DepthTwoModule, RoutedExperts, Routing, act_name
from ssah_kernels import ops

_ROWS_AT_ONCE = 512  # fewer, and a matrix product takes longer per row


@dataclass
class Watch:
    """What the watched modules need to know about the batch that is running.

    Attributes:
        gradient: whether a * dL/da is wanted too (then the pass must be differentiable).
        all_experts: whether an expert's moments are over all tokens, not those routed to it alone.
        token_mask: bool ``[rows, length]``, or None where every position counts.
        needed: int64 ``[n]``, the positions among rows * length that are not padding, or None: all.
        again: whether the pass goes back: what runs then was counted when it ran first.
    """

    gradient: bool
    all_experts: bool = False
    token_mask: Tensor | None = None
    needed: Tensor | None = None
    again: bool = False

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The block is the batch's backward pass."""
        self.again = True
        yield
        self.again = False

    def moments(self, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
        """Count ``[]``, mean and M2 ``[n_units]`` that take what runs now.

        Recomputation for the backward pass gives new ones, which nobody reads.
        """
        return ops.new_moments(sums.mean) if self.again else (sums.count, sums.mean, sums.m2)

    def read(self, batch: Batch) -> None:
        """Set the masks for ``batch``, which runs next."""
        device = batch.inputs["input_ids"].device
        whole = bool(batch.token_mask.all())
        self.token_mask = None if whole else to_device(batch.token_mask, device)
        self.needed = None
        if batch.padding_unseen:
            # Where the batch lies, usually the host: how many there are must be known there.
            self.needed = to_device(batch.attended.flatten().nonzero()[:, 0], device)

    def mask(self, x: Tensor) -> Tensor | None:
        """The token mask, with the leading shape of ``x``: ``[rows, length]`` or ``[tokens]``, as
        some models flatten rows and length."""
        if self.token_mask is None:
            return None
        return self.token_mask.to(x.device).reshape(x.shape[:-1])

    def by_rows(self, run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor) -> Tensor:
        """``run`` on the needed positions of ``x`` and their token mask, some rows at a time.

        Positions that are not needed come out as zeros. A CPU keeps the rows of one piece in its
        cache, and its allocator keeps their memory. ``x``: ``[rows, length, channels]``.
        """
        flat, mask = self.take(x)
        size = _ROWS_AT_ONCE if x.device.type == "cpu" else max(1, len(flat))
        pieces = flat.split(size)
        masks = [None] * len(pieces) if mask is None else mask.split(size)
        parts = [run(rows, counted) for rows, counted in zip(pieces, masks, strict=True)]
        out = torch.cat(parts) if len(parts) > 1 else parts[0]  # cat copies even one
        return self.put_back(out, x.shape[:-1])

    def take(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The needed positions of ``x``, ``[n, channels]``, and their token mask ``[n]``."""
        flat, mask = x.flatten(0, -2), self.mask(x)  # [rows * length, channels]
        mask = None if mask is None else mask.flatten()  # [rows * length]
        if self.needed is None:
            return flat, mask
        needed = self.needed.to(x.device)
        return flat[needed], None if mask is None else mask[needed]

    def put_back(self, out: Tensor, leading: torch.Size) -> Tensor:
        """``out`` of the needed positions among all, the rest zeros: ``[*leading, channels]``."""
        if self.needed is not None:
            every = out.new_zeros(leading.numel(), out.shape[-1])  # [rows * length, channels]
            out = every.index_copy_(0, self.needed.to(out.device), out)
        return out.view(*leading, out.shape[-1])

    def tap(self, x: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        """``x``, such that ``take`` gets it and its gradient, both ``[..., n_units]``, when this
        arrives. RuntimeError where no gradient is recorded.
        """
        if not self.gradient:
            return x
        check_recorded()
        if not x.requires_grad:  # the first watched module: nothing before it needs a gradient
            x = x.detach().requires_grad_()
        return _Tap.apply(x, take)


def check_recorded() -> None:
    """Raise RuntimeError where no gradient is recorded, so that none would arrive later."""
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "a scored module runs under torch.no_grad(), as checkpointing with use_reentrant="
            "True has it: use use_reentrant=False, or a metric without gradients"
        )


class _Tap(torch.autograd.Function):
    """Identity; backward gives input and gradient, ``[..., n_units]``, to ``take``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # [..., n_units], as grad
        ctx.take(x, grad)
        return grad, None


def _adding(sums: Sums, mask: Tensor | None) -> Callable[[Tensor, Tensor], None]:
    """What adds input * gradient, ``[..., n_units]``, to ``sums`` where the mask is True."""
    return lambda x, grad: ops.taylor_moments_(x, grad, sums.signed, sums.squared, mask)


@contextmanager
def watching(
    modules: Mapping[str, DepthTwoModule],
    sums: Mapping[str, Sums],
    *,
    gradient: bool,
    all_experts: bool = False,
) -> Iterator[Watch]:
    """Accumulate into ``sums`` whatever runs through ``modules`` inside the block.

    A gated FFN's own forward is replaced by one that takes product and moments in one operator,
    that of a layer's experts by one that runs A, sigma and B step by step; everywhere else a hook
    reads B's input, after all hooks that others have put there. All are gone after the block,
    whatever happens in it.
    """
    watch = Watch(gradient, all_experts)
    layers: set[nn.Module] = set()  # experts of one share one packed B, replaced once
    with ExitStack() as stack:
        for name, module in modules.items():
            gated, routed = module.gated, module.routed
            if routed is not None:
                own = sums[name]
                assert isinstance(own, ExpertSums)
                if module.down not in layers:
                    layers.add(module.down)
                    forward = _experts_forward(routed, own.layer, watch)
                    stack.enter_context(replaced_forward(routed.module, forward))
            elif gated is not None and gated.is_plain:
                forward = _gated_forward(module, sums[name], watch)
                stack.enter_context(replaced_forward(gated.module, forward))
            else:
                handle = module.down.register_forward_pre_hook(_hook(sums[name], watch))
                stack.callback(handle.remove)
        yield watch


def _gated_forward(module: DepthTwoModule, sums: Sums, watch: Watch) -> Any:
    gated = module.gated
    assert gated is not None

    def product(x: Tensor, mask: Tensor | None) -> Tensor:
        # x: [tokens, hidden] and mask: [tokens], or with [rows, length] for tokens.
        gate, up = gated.project(x)
        return ops.gated_moments(gate, up, *watch.moments(sums), mask, act=gated.act)

    def rest(x: Tensor, mask: Tensor | None) -> Tensor:
        a = product(x, mask)
        # Nobody reads what comes after the last activation: there B is spared.
        return x if gated.final else module.down(a)

    def forward(x: Tensor) -> Tensor:
        if watch.gradient:
            # gate and up are gone before B runs: the pass needs no more memory than the model's.
            mask = watch.mask(x)
            return module.down(watch.tap(product(x, mask), _adding(sums, mask)))
        with at_hand(*gated.module.children()):
            return watch.by_rows(rest, x)

    return forward


def _experts_forward(routed: RoutedExperts, layer: Sums, watch: Watch) -> Any:
    activation = routed.activation
    # Where hooks hang on the activation it is called; the fused operator would go around it.
    fused = activation is not None and runs_own_forward(activation) and not has_hooks(activation)
    act = act_name(activation) if activation is not None and fused else None

    def alone(projected: Tensor, expert: int, mask: Tensor | None) -> Tensor:
        """What enters the expert's B, ``[tokens, n_units]``, whose moments are taken."""
        moments = watch.moments(layer.of_expert(expert))
        if act is not None:
            gate, up = projected.chunk(2, dim=-1)  # [tokens, n_units] each
            return ops.gated_moments(gate, up, *moments, mask, act=act)
        a = routed.gate(projected)
        ops.channel_moments_(a.detach(), *moments, mask)
        return a

    def product(projected: Tensor, routing: Routing, counted: Tensor | None) -> Tensor:
        """What enters B, ``[pairs, n_units]``, whose moments are taken."""
        if projected.device.type == "cpu" and act is not None:  # fused, an expert at a time
            pieces = [
                alone(projected[a:b], expert, None if counted is None else counted[a:b])
                for expert, (a, b) in enumerate(routing.spans)
                if b > a
            ]
            return torch.cat(pieces) if pieces else projected.new_empty(0, routed.n_units)
        a = routed.gate(projected)
        if not watch.again:
            add_moments_(layer, a.detach(), routing, counted)
        return a

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        # x: [..., hidden]; chosen, weights: [..., top_k], the experts of each token and their part.
        leading = x.shape[:-1]
        x, mask = watch.take(x)
        chosen, weights = (watch.take(each)[0] for each in (chosen, weights))  # [n, top_k] each
        if watch.all_experts:
            for expert in range(routed.n_experts):  # each has all tokens: nobody asks which
                alone(routed.project_alone(x, expert), expert, mask)
            if routed.final:
                return watch.put_back(x, leading)
        routing = Routing.of(chosen, routed.n_experts)
        projected = routed.project(x[routing.token], routing)  # [pairs, width of A]
        if watch.all_experts:
            a = routed.gate(projected)
        else:
            counted = None if mask is None else mask[routing.token]
            a = product(projected, routing, counted)
            a = watch.tap(a, lambda a, grad: add_gradients_(layer, a, grad, routing, counted))
        if routed.final and not watch.gradient:  # nobody reads what comes after
            return watch.put_back(x, leading)
        out = routing.weighed(routed.put_out(a, routing), weights)
        return watch.put_back(out.to(x.dtype), leading)

    return forward


def _hook(sums: Sums, watch: Watch) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]  # [..., n_units]
        mask = watch.mask(x)
        ops.channel_moments_(x.detach(), *watch.moments(sums), mask)
        # Without a gradient nothing is returned: then B gets the very tensor that it would get.
        return (watch.tap(x, _adding(sums, mask)), *args[1:]) if watch.gradient else None

    return hook
