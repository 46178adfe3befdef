"""The operators and autograd: versions of what they write, gradients of what they return."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ACTIVATIONS, CASES
from samples import Sample, copied, flat
from torch import Tensor

import ssah_kernels
from ssah_kernels import ops
from ssah_kernels.schema import SCHEMAS

F64 = torch.float64
WRITING = [op for op, schema in SCHEMAS.items() if "!" in schema]


def full_call(op: str) -> tuple[Sample, list[Any]]:
    """A call with every optional argument that it can have at once, and a copy of its arguments."""
    samples = [s for s in CASES[op].samples(torch.bfloat16) if "expanded" not in s.name]
    sample = max(samples, key=lambda s: len([a for a in s.args if a is not None]))
    return sample, [copied(a) for a in sample.args]


def written(op: str, args: list[Any]) -> list[Tensor]:
    return [tensor for i in CASES[op].outputs if i < len(args) for tensor in flat(args[i])]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", WRITING)
def test_versions_of_what_is_written_grow(op: str, backend: str) -> None:
    sample, args = full_call(op)
    outputs = written(op, args)
    others = [t for a in args if isinstance(a, (Tensor, list)) for t in flat(a)]
    others = [t for t in others if isinstance(t, Tensor) and not any(t is o for o in outputs)]
    assert len(outputs) >= 2
    before = [[t._version for t in tensors] for tensors in (outputs, others)]
    with ssah_kernels.use(backend):
        getattr(torch.ops.ssah, op)(*args, **sample.kwargs)
    assert all(t._version > v for t, v in zip(outputs, before[0], strict=True))
    assert [t._version for t in others] == before[1]


def update(weight: Tensor) -> None:
    state = [torch.zeros_like(weight, requires_grad=False) for _ in range(3)]
    lr, step = torch.tensor(0.1), torch.tensor(1.0)
    ops.masked_adamw_([weight], [state[0] + 1], [state[1]], [state[2]], [None], [0], lr, step)


def test_backward_through_an_updated_weight_raises() -> None:
    weight = torch.ones(3, 4, requires_grad=True)
    for change in (update, lambda w: torch._foreach_add_([w], 1.0)):
        x = torch.ones(2, 4, requires_grad=True)
        loss = (x @ weight.t()).sum()
        with torch.no_grad():
            change(weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_backward_through_an_updated_state_raises() -> None:
    x = torch.randn(5, 4)
    count, mean, m2 = ops.new_moments(x)
    weight = torch.ones(4, dtype=F64, requires_grad=True)
    for i, call in enumerate(
        (
            lambda: ops.channel_moments_(x, count, mean, m2),
            lambda: ops.gated_moments(x, x, count, mean, m2),
            lambda: ops.taylor_moments_(x, x, mean, m2),
        )
    ):
        loss = (weight * mean).sum() + (weight * m2).sum()
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert mean._version == i + 1


def test_a_refused_call_leaves_the_version() -> None:
    weight = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        ops.masked_sgd_([weight], [weight[:2]], None, [None], [0], torch.tensor(1), torch.tensor(1))
    assert weight._version == 0


@pytest.mark.parametrize("op", WRITING)
def test_what_takes_a_gradient_is_not_changed_in_grad_mode(op: str) -> None:
    sample, args = full_call(op)
    call = getattr(torch.ops.ssah, op)
    # Codes of state and remainders of weights are integers, which take no gradient.
    for tensor in filter(torch.is_floating_point, written(op, args)):
        before = tensor.clone()
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match="requires grad and would be changed in place"):
            call(*args, **sample.kwargs)
        assert torch.equal(tensor.detach().nan_to_num(), before.nan_to_num())
        with torch.no_grad():
            call(*args, **sample.kwargs)
        tensor.requires_grad_(False)


@pytest.mark.parametrize("op", WRITING)
def test_inference_tensors_change_in_inference_mode_alone(op: str) -> None:
    sample, normal = full_call(op)
    call = getattr(torch.ops.ssah, op)
    with torch.inference_mode():
        args = [copied(a) for a in sample.args]
        call(*args, **sample.kwargs)
        call(*normal, **sample.kwargs)  # ordinary tensors change there too
    assert all(t._version > 0 for t in written(op, normal))
    before = [t.clone() for t in written(op, args)]
    with pytest.raises(RuntimeError, match=r"was made in torch.inference_mode\(\)"):
        call(*args, **sample.kwargs)
    for a, b in zip(written(op, args), before, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", ["params[0]", "exp_avg_sqs[0]"])
def test_the_error_names_the_argument(name: str) -> None:
    tensors = [torch.ones(2, 3) for _ in range(4)]
    tensors[{"params[0]": 0, "exp_avg_sqs[0]": 3}[name]].requires_grad_()
    lists = [[t] for t in tensors]
    with pytest.raises(RuntimeError, match=name.replace("[", r"\[").replace("]", r"\]")):
        ops.masked_adamw_(*lists, [None], [0], torch.tensor(0.1), torch.tensor(1.0))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_operator_itself_has_first_and_second_derivatives(act: str, backend: str) -> None:
    torch.manual_seed(1)
    gate, up = (torch.randn(6, 5, dtype=F64, requires_grad=True) for _ in "ab")
    mask = torch.rand(6) < 0.5

    def output(gate: Tensor, up: Tensor) -> Tensor:
        return torch.ops.ssah.gated_moments(gate, up, *ops.new_moments(gate), mask, act=act)

    with ssah_kernels.use(backend), warnings.catch_warnings():
        warnings.simplefilter("error")  # autograd warns where it knows no derivative
        assert torch.autograd.gradcheck(output, (gate, up))
        assert torch.autograd.gradgradcheck(output, (gate, up))
    third = output(gate, up).sin().sum()
    for _ in range(3):
        (slope,) = torch.autograd.grad(third, gate, create_graph=True)
        third = slope.sum()
    assert slope.isfinite().all()


def test_a_second_derivative_keeps_the_dtypes() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True) for _ in "ab")
    output = ops.gated_moments(gate, up, *ops.new_moments(gate))
    slopes = torch.autograd.grad(output.sum(), (gate, up), create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()
    assert gate.grad is not None
    assert gate.grad.dtype == torch.bfloat16


def test_norms_have_derivatives() -> None:
    torch.manual_seed(2)
    x, y = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((4, 3), (3, 5)))
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    index = torch.tensor([0, 2])

    def norm(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return ops.masked_grad_norm([x, y], [index, None], [0, 1], scale)

    for function, inputs in ((ops.column_sq_norms, (x,)), (norm, (x, y, scale))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    zero = torch.zeros(4, 3, requires_grad=True)
    ops.masked_grad_norm([zero], [None], [0]).backward()
    assert torch.equal(zero.grad, torch.zeros(4, 3))  # as torch's own norm


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_compiles_with_its_gradient() -> None:
    def loss(gate: Tensor, up: Tensor, *state: Tensor) -> Tensor:
        return torch.ops.ssah.gated_moments(2 * gate, up, *state, act="gelu").sin().sum()

    torch.manual_seed(3)
    gate, up = (torch.randn(6, 8, requires_grad=True) for _ in "ab")
    outcomes = []
    for function in (loss, compiled(loss)):
        state = ops.new_moments(gate)
        value = function(gate, up, *state)
        outcomes.append((value, *torch.autograd.grad(value, (gate, up)), *state))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)
    assert outcomes[0][3] == 6


class Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 8)
        for name, state in zip(
            ("count", "mean", "m2"), ops.new_moments(torch.zeros(8)), strict=True
        ):
            self.register_buffer(name, state)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.ssah.gated_moments(self.project(x), x, self.count, self.mean, self.m2)


def test_an_exported_module_trains() -> None:
    module, x = Gated(), torch.randn(4, 8, requires_grad=True)
    exported = torch.export.export(module, (torch.randn(4, 8),))
    assert "ssah.gated_moments" in str(exported.graph)
    copy = exported.module()
    expected = torch.autograd.grad(module(x).sum(), (x, module.project.weight))
    actual = torch.autograd.grad(copy(x).sum(), (x, copy.project.weight))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert copy.count == 8  # the two share their buffers


@pytest.mark.parametrize("op", WRITING)
def test_vmap_is_refused_by_name(op: str) -> None:
    sample, args = full_call(op)
    first = args[0]

    def call(_: Tensor) -> None:
        batched = [t + _ for t in first] if isinstance(first, list) else first + _
        getattr(torch.ops.ssah, op)(batched, *args[1:], **sample.kwargs)

    with pytest.raises(NotImplementedError, match=f"ssah::{op} changes tensors in place"):
        torch.vmap(call)(torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.channel_moments_(x, *ops.new_moments(x)),
        lambda x: ops.gated_moments(x, x, *ops.new_moments(x)),
        lambda x: ops.gated_product(x, x, torch.ones(1, 4), torch.tensor(0)),
        lambda x: ops.taylor_moments_(x, x, *ops.new_moments(x)[1:]),
        ops.column_sq_norms,
    ],
)
def test_a_tangent_is_not_lost_in_silence(call: Callable[..., Any]) -> None:
    x = torch.randn(3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="carries a tangent of forward-mode"):
            call(dual)


def test_operators_are_tagged() -> None:
    for op in SCHEMAS:
        tags = getattr(torch.ops.ssah, op).default.tags
        assert torch.Tag.pt2_compliant_tag in tags
        waits = "masked" in op or op == "gated_product"
        assert (torch.Tag.cudagraph_unsafe in tags) == waits
