"""Derivatives: of the gated operators, and of the others that write nothing.

Each is a kernel for the Autograd key of the operator itself, so that ``ops.X`` and
``torch.ops.ssah.X`` are the same thing.

    h = act(gate) up                dL/dgate = dL/dh up act'(gate)    dL/dup = dL/dh act(gate)
    h = act(gate) up f              the same of dL/dh f, for the factors f
    norms_j = sum_i w_ij^2          dL/dw_ij = 2 w_ij dL/dnorms_j
    norm = sqrt(sum g^2) / scale    dL/dg = dL/dnorm g / (norm scale^2)
                                    dL/dscale = -dL/dnorm norm / scale

The moments have none: they are statistics of a forward pass, and nothing trains through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import memory
from .reference.gated_moments import activation
from .reference.gated_product import of_tokens
from .schema import NAMESPACE, SCHEMAS, arguments, operators


class _GatedMoments(torch.autograd.Function):
    """gated_moments below autograd; its backward reads gate and up once."""

    @staticmethod
    def forward(ctx: Any, below: Any, act: str, *args: Tensor | None) -> Tensor:
        ctx.save_for_backward(*args[:2])  # gate and up, [..., C]; h itself is not kept
        ctx.act = act
        return operators.gated_moments.default.redispatch(below, *args, act=act)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        product = operators.gated_moments_backward(grads[0], gate, up, act=ctx.act)
        return None, None, *product, None, None, None, None


class _GatedMomentsTwice(torch.autograd.Function):
    """gated_moments_backward below autograd; its own gradient is rare, and composed of torch's."""

    @staticmethod
    def forward(ctx: Any, below: Any, act: str, *args: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*args)
        ctx.act = act
        return operators.gated_moments_backward.default.redispatch(below, *args, act=act)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """In float64, as the reference; autograd rounds each to the dtype of its input."""
        again = torch.is_grad_enabled()  # a third derivative is wanted

        def own(t: Tensor) -> Tensor:
            t = t.double()
            return t if again and t.requires_grad else t.detach().requires_grad_()

        grad, gate, up = (own(t) for t in ctx.saved_tensors)
        with torch.enable_grad():
            output = activation(gate, ctx.act) * up
            first = torch.autograd.grad(output, (gate, up), grad, create_graph=True)
        product = torch.autograd.grad(
            first,
            (grad, gate, up),
            tuple(g.double() for g in grads),
            create_graph=again,
            allow_unused=True,  # relu has no curvature
        )
        return None, None, *product


class _GatedProduct(torch.autograd.Function):
    """gated_product below autograd; its backward is that of act(gate) * up, of grad * factors."""

    @staticmethod
    def forward(ctx: Any, below: Any, act: str, *args: Tensor) -> Tensor:
        if args[2].requires_grad:
            raise NotImplementedError(
                "factors requires grad, of which gated_product has none; it has those of gate and "
                "up: pass factors.detach()"
            )
        ctx.save_for_backward(*args)
        ctx.act = act
        return operators.gated_product.default.redispatch(below, *args, act=act)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up, factors, arm = ctx.saved_tensors
        grad = (grads[0] * of_tokens(factors, arm, gate)).to(gate.dtype)  # [..., C]
        product = operators.gated_moments_backward(grad, gate, up, act=ctx.act)
        return None, None, *product, None, None


def _kernel(op: str, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The kernel of ``op`` for the Autograd key.

    ``torch.library.register_autograd`` takes no schema that mutates, and its kernels must not use
    autograd themselves, as the reference does.
    """
    optional = len([name for kind, name in arguments(op) if kind.startswith("Tensor")])
    inputs = [i for i, (kind, _) in enumerate(arguments(op)) if kind == "Tensor"]
    tensors_of = memory.reader(op)

    def kernel(keyset: Any, *args: Any, act: str = "silu") -> Any:
        # The highest key is the one that runs now.
        below = keyset.remove(keyset.highestPriorityTypeId())
        if torch.is_grad_enabled() and any(args[i].requires_grad for i in inputs):
            memory.check_grad(op, args, tensors_of(args)[0])  # below, no gradients are recorded
            return function.apply(below, act, *args, *[None] * (optional - len(args)))
        return getattr(operators, op).default.redispatch(below, *args, act=act)

    return kernel


def _keep_weight(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _column_sq_norms(ctx: Any, grad: Tensor) -> Tensor:
    (weight,) = ctx.saved_tensors  # [out_features, in_features]
    # grad is [in_features]: each column has its own.
    return (2 * weight.double() * grad).to(weight.dtype)


def _keep_grads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grads, indices, dims, grad_scale = inputs
    ctx.indices, ctx.dims = indices, dims
    ctx.save_for_backward(*grads, output, grad_scale)


def _masked_grad_norm(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    """d norm / d g = g / (norm grad_scale^2) where it was selected; 0 where all of it is 0."""
    *grads, norm, grad_scale = ctx.saved_tensors
    scale = 1.0 if grad_scale is None else grad_scale.double().reshape(())  # it may be [1]
    # The norm has no slope at 0; torch.linalg.vector_norm gives 0 there too.
    factor = torch.where(norm == 0, 0, slope / (norm * scale**2))
    results = []
    for grad, index, dim in zip(grads, ctx.indices, ctx.dims, strict=True):
        whole = (grad.double() * factor).to(grad.dtype)
        if index is not None:
            chosen = whole.index_select(dim, index)  # [trained, columns]
            whole = torch.zeros_like(whole).index_copy(dim, index, chosen)
        results.append(whole)
    if grad_scale is None:  # the dispatcher leaves out what is the default
        return results, None, None
    to_scale = (-slope * norm / scale).to(grad_scale.dtype).reshape(grad_scale.shape)
    return results, None, None, to_scale


def _no_vmap(op: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"ssah::{op} changes tensors in place, which torch.vmap would have to do once a sample;"
            " it is not supported: call it once, with the samples as a leading dimension of the"
            " input, or in a loop"
        )

    return refuse


def register(lib: torch.library.Library) -> None:
    """Register every derivative on ``lib``, and what torch.func cannot do."""
    for op, schema in SCHEMAS.items():
        if "!" in schema:
            torch.library.register_vmap(f"{NAMESPACE}::{op}", _no_vmap(op), lib=lib)
        if op.endswith("_"):  # returns nothing to differentiate; its state must not join the graph
            lib.impl(op, torch.library.fallthrough_kernel, "Autograd")
    for op, function in (
        ("gated_moments", _GatedMoments),
        ("gated_moments_backward", _GatedMomentsTwice),
        ("gated_product", _GatedProduct),
    ):
        lib.impl(op, _kernel(op, function), "Autograd", with_keyset=True)
    for op, backward, keep in (
        ("column_sq_norms", _column_sq_norms, _keep_weight),
        ("masked_grad_norm", _masked_grad_norm, _keep_grads),
    ):
        torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=keep, lib=lib)
