"""The gated product of an FFN with less kept for the backward pass.

h = act(g) * u, with g = gate(x) and u = up(x), all ``[tokens, units]``. Its derivatives are

    dg = dh * u * act'(g)        du = dh * act(g)

Eager autograd keeps g, act(g), u and h: four numbers a unit and token. g and u are enough: one
operator, ``gated_moments_backward``, reads both once and gives both derivatives, and B keeps of h
the trained channels that it needs (`ssah.training.splitting.masked_linear`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.compat.modules import has_hooks, is_transformed
from ssah.models import runs_own_forward
from ssah.training.splitting.projection import MaskedProjection
from ssah.units import DepthTwoModule


class _GatedProduct(torch.autograd.Function):
    """act(gate) * up, each ``[..., units]``, in the bits of the model's own activation module."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: nn.Module, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return act(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        product = torch.ops.ssah.gated_moments_backward(grads[0], gate, up, act=ctx.name)
        return *product, None, None


def _forward(
    gate: nn.Module | None, up: nn.Module, down: nn.Module, act: nn.Module, name: str, x: Tensor
) -> Tensor:
    """``down(act(gate(x)) * up(x))``, x ``[..., hidden]``; without ``gate``, ``up`` gives both."""
    if gate is None:
        first, second = up(x).chunk(2, dim=-1)  # [..., 2 * units]: gate, then up
    else:
        first, second = gate(x), up(x)
    compiling = torch.compiler.is_compiling()
    hooked = not compiling and (has_hooks(act) or not runs_own_forward(act))
    if hooked and isinstance(up, MaskedProjection):
        up.check_order()
    # The derivative below is that of the function alone, not of what a hook makes of it. The
    # compiler fuses the plain product itself, and torch.func takes none that is written by hand.
    if compiling or hooked or not torch.is_grad_enabled() or is_transformed():
        return down(act(first) * second)
    return down(_GatedProduct.apply(first, second, act, name))


def install_gated(model: PreTrainedModel, modules: Mapping[str, DepthTwoModule]) -> list[nn.Module]:
    """Let gated FFNs of ``model`` keep gate and up alone; returns the modules that now do."""
    changed: list[nn.Module] = []
    for module in modules.values():
        gated = module.gated
        if gated is None or "forward" in vars(gated.module):
            continue  # somebody else has replaced its forward, and expects to be called
        owners = dict.fromkeys(owned.param.rpartition(".")[0] for owned in module.inputs)
        *gates, up = (model.get_submodule(owner) for owner in owners)
        gate = gates[0] if gates else None
        # A partial, not a closure: copying the model copies what it refers to.
        gated.module.forward = partial(_forward, gate, up, module.down, gated.activation, gated.act)
        changed.append(gated.module)
    return changed


def uninstall_gated(changed: list[nn.Module]) -> None:
    """The modules' own forward again; one that somebody has put there since is left alone."""
    for module in changed:
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del module.forward
