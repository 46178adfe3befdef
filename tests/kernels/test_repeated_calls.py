"""Calls that are known: what differs from the call before is checked again, and refused as ever."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ssah_kernels import checks, memory, ops, overlap
from ssah_kernels.optim import MaskedAdamW
from ssah_kernels.repeated import Repeated

LR = torch.tensor(0.1, dtype=torch.float64)


class Step:
    """Lists of one update, which may be called again and again."""

    def __init__(self) -> None:
        self.params = [torch.ones(6, 4), torch.ones(5), torch.ones(2, 3, 4)]
        self.indices: list[Tensor | None] = [torch.tensor([0, 2]), None, torch.tensor([1])]
        self.shapes = (2, 4), (5,), (1, 3, 4)
        self.states = [[torch.zeros(s) for s in self.shapes] for _ in range(2)]
        self.grads = [torch.ones_like(p) for p in self.params]
        self.step = 0

    def __call__(self, **options: Any) -> None:
        self.step += 1
        step = torch.tensor(float(self.step))
        lists = self.params, self.grads, *self.states, self.indices, [0, 0, 0]
        ops.masked_adamw_(*lists, LR, step, **options)


@pytest.fixture
def known() -> Step:
    """A step that was taken three times, after which it is known."""
    step = Step()
    for _ in range(3):
        step()
    return step


def checked(call: Callable[[], object]) -> int:
    """How often all arguments are checked in ``call``."""
    with mock.patch.object(overlap, "first", wraps=overlap.first) as check:
        call()
    return check.call_count


def test_a_call_is_known_once_it_came_twice_and_computes_the_same() -> None:
    step, other = Step(), Step()
    assert [checked(step) for _ in range(5)] == [1, 1, 0, 0, 0]
    for i in range(5):
        # Every second gradient has other strides, with which no call is known.
        first = torch.ones(4, 6).t() if i % 2 else torch.ones(6, 4)
        other.grads = [first, *(g.clone() for g in other.grads[1:])]
        other()
    for own, must in zip(step.params, other.params, strict=True):
        assert torch.equal(own, must)
    weight = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
    for _ in range(5):
        weight.grad = torch.ones_like(weight)
        adamw.step()
    torch.testing.assert_close(step.params[0][[0, 2]], weight.detach()[[0, 2]].float())
    assert torch.equal(step.params[0][[1, 3, 4, 5]], torch.ones(4, 4))


CHANGES: dict[str, Callable[[Step], object]] = {
    "another gradient's shape": lambda s: s.grads.__setitem__(0, torch.ones(2, 4)),
    "a gradient of other strides": lambda s: s.grads.__setitem__(0, torch.ones(4, 6).t()),
    "another state": lambda s: s.states[0].__setitem__(1, torch.zeros(5)),
    "a parameter that was moved": lambda s: setattr(s.params[1], "data", s.params[1].clone()),
    "an index that was changed": lambda s: s.indices[0].add_(1),
    "a parameter of other strides": lambda s: setattr(
        s.params[0], "data", s.params[0].data.view(4, 6).t()
    ),
    "an index of the same length in another place": lambda s: setattr(
        s.indices[0], "data", torch.tensor([1, 5])
    ),
    "a gradient that was cut off another one": lambda s: s.grads.__setitem__(
        0, torch.ones(6, 8)[:, :4]
    ),
    "another index": lambda s: s.indices.__setitem__(2, torch.tensor([0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_checked_again(change: str, known: Step) -> None:
    CHANGES[change](known)
    assert checked(known) == 1


def test_new_gradients_and_numbers_are_taken_as_they_are(known: Step) -> None:
    before = known.params[1].clone()
    known.grads = [torch.full_like(p, -3.0) for p in known.params]
    assert checked(known) == 0
    assert bool((known.params[1] > before).all())


REFUSED: dict[str, tuple[Callable[[Step], object], str]] = {
    "a gradient of another size": (
        lambda s: s.grads.__setitem__(1, torch.ones(4)),
        r"grads\[1\] has shape \(4,\)",
    ),
    "a gradient of another dtype": (
        lambda s: s.grads.__setitem__(0, torch.ones(6, 4).double()),
        r"grads\[0\] has dtype torch\.float64",
    ),
    "a sparse gradient": (
        lambda s: s.grads.__setitem__(0, torch.ones(6, 4).to_sparse()),
        r"grads\[0\] has layout torch\.sparse_coo",
    ),
    "a gradient that is a parameter": (
        lambda s: s.grads.__setitem__(1, s.params[1]),
        r"params\[1\] and grads\[1\] share memory",
    ),
    "an index that falls": (
        lambda s: s.indices[0].copy_(torch.tensor([2, 0])),
        r"indices\[0\] has 0 after 2 at position 1",
    ),
    "an index out of range": (
        lambda s: s.indices[2].fill_(2),
        r"indices\[2\] goes from 2 to 2; it must stay within 0 to 1",
    ),
    "a parameter of another size in its place": (
        lambda s: setattr(s.params[1], "data", s.params[1].data[:4]),
        r"has shape \(5,\); it must be \(4,\)",
    ),
    "a parameter of another shape in its place": (
        lambda s: setattr(s.params[0], "data", s.params[0].data.view(4, 6)),
        r"grads\[0\] has shape \(6, 4\); it must be \(2, 6\)",
    ),
    "a parameter whose elements have become one": (
        lambda s: setattr(s.params[0], "data", s.params[0].data[0, :1].expand(6, 4)),
        r"params\[0\] has several elements in one place",
    ),
    "state of another dtype in its place": (
        lambda s: setattr(s.states[0][0], "data", s.states[0][0].data.view(torch.int32)),
        r"exp_avgs\[0\] has dtype torch\.int32",
    ),
    "state that was cut in its place": (
        lambda s: s.states[1][0].resize_(1, 4),
        r"exp_avg_sqs\[0\] has shape \(1, 4\); it must be \(2, 4\)",
    ),
    "state of other strides in its place": (
        lambda s: setattr(s.states[0][0], "data", s.states[0][0].data.view(4, 2).t()),
        r"exp_avgs\[0\] must be contiguous",
    ),
    "an index out of range in another place": (
        lambda s: setattr(s.indices[0], "data", torch.tensor([0, 6])),
        r"indices\[0\] goes from 0 to 6; it must stay within 0 to 5",
    ),
    "an index that was cut in its place": (
        lambda s: setattr(s.indices[0], "data", s.indices[0].data[:1]),
        r"exp_avgs\[0\] has shape \(2, 4\); it must be \(1, 4\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_after_it_was_right(name: str, known: Step) -> None:
    change, message = REFUSED[name]
    change(known)
    kept = [p.clone() for p in known.params]
    with pytest.raises((TypeError, ValueError), match=message):
        known()
    for own, must in zip(known.params, kept, strict=True):
        assert torch.equal(own, must)


def test_where_gradients_are_recorded_a_parameter_that_takes_one_is_refused(known: Step) -> None:
    known.params[0].requires_grad_()
    with torch.no_grad():
        known()
    with pytest.raises(RuntimeError, match=r"params\[0\] requires grad"):
        known()


def test_parameters_may_be_swapped_after_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch swaps no tensor that has a weak reference, and a module's conversion may swap."""
    model = torch.nn.Linear(3, 2)
    optimizer = MaskedAdamW(model.parameters())
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    kept = model.weight
    model.double()
    assert model.weight is kept
    assert kept.dtype is torch.float64


def test_momentum_without_buffers_is_refused_after_steps_without() -> None:
    weight, grad, one = torch.ones(3, 2), torch.ones(3, 2), torch.tensor(1.0)
    for _ in range(3):
        ops.masked_sgd_([weight], [grad], None, [None], [0], LR, one)
    with pytest.raises(ValueError, match="momentum_buffers is None"):
        ops.masked_sgd_([weight], [grad], None, [None], [0], LR, one, momentum=0.9)


def test_a_call_is_forgotten_with_any_of_its_tensors() -> None:
    repeated = Repeated("masked_adamw_", memory.reader("masked_adamw_"))
    step = Step()
    lists = [step.params, step.grads, *step.states, step.indices]
    args = (*lists, [0, 0, 0], LR, torch.tensor(1.0))
    for _ in range(2):
        repeated.learn(args, {}, checks.masked_adamw_(*args))
    with torch.no_grad():
        assert repeated.ready(args, {}, *memory.reader("masked_adamw_")(args)) is not None
        step.states[1][2] = torch.zeros(1, 3, 4)
        gc.collect()
        assert not repeated._known
        assert repeated.ready(args, {}, *memory.reader("masked_adamw_")(args)) is None


def test_gradients_lie_apart_from_every_stretch() -> None:
    """Of memory [0, 10) with stretches [2, 4) and [6, 8), each gradient of two numbers."""
    memory_of_all = torch.zeros(10)
    at = memory_of_all.data_ptr()
    stretches = at + 4 * torch.tensor([[2, 6], [4, 8]])
    apart = []
    for begin in range(9):
        grads = [memory_of_all[begin : begin + 2]]
        placement = torch.ops.ssah_cpu.placement([], grads)
        apart.append(torch.ops.ssah_cpu.is_placed([], grads, placement, stretches))
    assert apart == [True, False, False, False, True, False, False, False, True]


def test_stretches_join_where_they_overlap() -> None:
    whole = torch.zeros(100)
    columns = whole[:24].view(4, 6)
    begins, ends = overlap.stretches([columns[:, :3], whole[40:50], columns[:, 3:]])
    at = whole.data_ptr()
    assert [b - at for b in begins] == [0, 160]
    assert [e - at for e in ends] == [96, 200]
