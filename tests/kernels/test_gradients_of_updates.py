"""Gradients of the masked updates: read at the index, of float32, and those that overflowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, check_skipped
from cpu_compare import on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ssah_kernels
from ssah_kernels import ops
from ssah_kernels.optim import MaskedAdamW, MaskedSGD, calls

UPDATES = ("masked_adamw_", "masked_sgd_")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LR, STEP, SCALE, CLIP = 0.1, 3, 8.0, 0.5


def adamw_by_hand(w: float, g: float, m: float, v: float) -> list[float]:
    """A weight and its moments after one step, in Python's float64; its defaults, no decay."""
    g = g / SCALE * CLIP
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    step = m / (1 - 0.9**STEP) / (math.sqrt(v / (1 - 0.999**STEP)) + 1e-8)
    return [w - LR * step, m, v]


def sgd_by_hand(w: float, g: float, b: float) -> list[float]:
    b = 0.9 * b + g / SCALE * CLIP
    return [w - LR * b, b]


def call(op: str, *lists: list[Any], **more: Any) -> None:
    options = {"weight_decay": 0.0} if op == "masked_adamw_" else {"momentum": 0.9}
    scalars = [torch.tensor(float(x), dtype=F64) for x in (LR, STEP, SCALE, CLIP)]
    getattr(ops, op)(*lists, *scalars, **options, **more)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("op", UPDATES)
def test_every_trained_entry_follows_the_formula(
    op: str, dim: int, dtype: torch.dtype, backend: str
) -> None:
    """A loop over entries, with gradients of the parameter's shape, in float32 where that is wider:
    of 16 bits they would have fewer digits than the state shows."""
    g = torch.Generator().manual_seed(1)
    wide, state = (F32, F32) if dtype.itemsize == 2 else (dtype, dtype)
    shape, index = (4, 5), torch.tensor([0, 3])
    p = torch.randn(shape, generator=g).to(dtype)
    grad = torch.randn(5, 4, generator=g).to(wide).t()  # transposed: its rows are no neighbours
    kept = [torch.rand(p.index_select(dim, index).shape, generator=g).to(state) for _ in "mv"]
    kept = kept[: 2 if op == "masked_adamw_" else 1]
    before, versions = p.clone(), (p._version, grad._version)
    formula = adamw_by_hand if op == "masked_adamw_" else sgd_by_hand
    expected = [[t.double() for t in (p, *kept)][i].clone() for i in range(1 + len(kept))]
    for row in range(shape[0]):
        for column in range(shape[1]):
            unit = (row, column)[dim]
            if unit not in index:
                continue
            place = [row, column]
            place[dim] = index.tolist().index(unit)
            at = tuple(place)  # in what is compact
            states = [float(s[at]) for s in kept]
            new = formula(float(p[row, column]), float(grad[row, column]), *states)
            expected[0][row, column] = new[0]
            for s, value in zip(expected[1:], new[1:], strict=True):
                s[at] = value
    with ssah_kernels.use(backend):
        call(op, [p], [grad], *([s] for s in kept), [index], [dim])
    frozen = torch.ones(shape, dtype=torch.bool).index_fill_(dim, index, False)
    assert torch.equal(p[frozen], before[frozen])
    for actual, exact, kind in zip((p, *kept), expected, (dtype, *[state] * 2), strict=False):
        eps = torch.finfo(kind).eps
        torch.testing.assert_close(actual.double(), exact, rtol=4 * eps, atol=4 * eps)
    assert p._version > versions[0]
    assert grad._version == versions[1]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(6, 9), (7,), (3, 4, 5)])
def test_the_two_shapes_are_one_where_everything_trains(
    shape: tuple[int, ...], backend: str
) -> None:
    """An index of all entries, in their order, is the only one that selects as many."""
    g = torch.Generator().manual_seed(2)
    for dim in (0, -1):
        p, grad = (torch.randn(shape, generator=g) for _ in "pg")
        results = []
        for index in (None, torch.arange(shape[dim])):
            mine, m, v = p.clone(), torch.zeros(shape), torch.zeros(shape)
            with ssah_kernels.use(backend):
                call("masked_adamw_", [mine], [grad], [m], [v], [index], [dim])
            results.append(mine)
        assert torch.equal(*results)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_of_a_parameter_that_is_no_matrix_the_gradient_is_read_too(backend: str) -> None:
    """Its trained entries are copied and written back, see checks/matrices.py."""
    g = torch.Generator().manual_seed(3)
    start, grad = (torch.randn(4, 6, 2, 3, generator=g) for _ in "pg")
    odd, index = {"memory_format": torch.channels_last}, torch.tensor([1, 2])
    results = []
    for of_param, given in (
        (odd, grad),
        (odd, grad[index]),
        (odd, grad.contiguous(**odd)),
        ({}, grad.contiguous(**odd)),
    ):
        p, m, v = start.clone().contiguous(**of_param), *torch.zeros(2, 2, 6, 2, 3)
        with ssah_kernels.use(backend):
            call("masked_adamw_", [p], [given], [m], [v], [index], [0])
        results.append(p)
    assert all(torch.equal(p, results[0]) for p in results[1:])
    assert not torch.equal(results[0][1], start[1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", UPDATES)
def test_nothing_is_written_where_a_gradient_overflowed(op: str, backend: str) -> None:
    for dtype in (F32, BF16):
        for sample in CASES[op].samples(dtype):
            check_skipped(CASES[op], on(backend, op), sample)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"grads": [torch.zeros(4, 3)]},
            ValueError,
            r"grads\[0\] has shape \(4, 3\); it must be \(2, 3\), what is trained, or that of its",
        ),
        (
            {"grads": [torch.zeros(5, 3).half()]},
            TypeError,
            r"grads\[0\] has dtype torch.float16; .* must be bfloat16 or float32",
        ),
        ({"found_inf": torch.tensor(1)}, ValueError, "found_inf is torch.int64"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"found_inf is torch.float32 of shape \(2,\)"),
    ],
)
def test_the_wrong_argument_is_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    p, m = torch.zeros(5, 3, dtype=BF16), torch.zeros(2, 3)
    args = {
        **{"params": [p], "grads": [torch.zeros(5, 3)], "exp_avgs": [m], "exp_avg_sqs": [m + 1]},
        **{"indices": [torch.tensor([0, 2])], "dims": [0]},
        **{"lr": torch.tensor(0.1), "step": torch.tensor(1.0)},
    }
    with pytest.raises(error, match=message):
        ops.masked_adamw_(**(args | change))
    assert not m.any()


def test_gradients_of_a_call_have_one_dtype() -> None:
    ps, ms = [torch.zeros(2, 3, dtype=BF16) for _ in "ab"], [torch.zeros(2, 3) for _ in "abcd"]
    grads = [torch.zeros(2, 3), torch.zeros(2, 3, dtype=BF16)]
    with pytest.raises(TypeError, match=r"grads\[1\] has dtype torch.bfloat16.*must be float32"):
        call("masked_adamw_", ps, grads, ms[:2], ms[2:], [None, None], [0, 0])


def test_traced_without_data() -> None:
    """Shapes alone decide how a gradient is read, and nothing waits for ``found_inf``."""
    with FakeTensorMode():
        shapes = ((5, 3), (5, 3), (2, 3), (2, 3), (4, 3))
        p, grad, m, v, short = (torch.empty(s, device="cuda") for s in shapes)
        index = torch.empty(2, dtype=torch.int64, device="cuda")
        found = torch.empty((), dtype=F64, device="cuda")
        scalars = [torch.empty((), dtype=F64, device="cuda") for _ in range(2)]
        ops.masked_adamw_([p], [grad], [m], [v], [index], [0], *scalars, found_inf=found)
        with pytest.raises(ValueError, match=r"grads\[0\] has shape \(4, 3\)"):
            ops.masked_adamw_([p], [short], [m], [v], [index], [0], *scalars, found_inf=found)


@pytest.mark.parametrize("op", UPDATES)
def test_opcheck(op: str) -> None:
    p, m, v = torch.zeros(5, 3, dtype=BF16), torch.zeros(2, 3), torch.ones(2, 3)
    states = ([m], [v]) if op == "masked_adamw_" else ([m],)
    scalars = (torch.tensor(0.1), torch.tensor(1.0))
    args = ([p], [torch.ones(5, 3)], *states, [torch.tensor([0, 2])], [0], *scalars)
    torch.library.opcheck(
        getattr(torch.ops.ssah, op).default, args, {"found_inf": torch.tensor(0.0)}
    )


# ------------------------------------------------------------------------------------ optimisers


def twins(kind: str, dtype: torch.dtype = F32) -> list[tuple[list[Tensor], torch.optim.Optimizer]]:
    """The same parameters under our optimiser and under torch's."""
    g = torch.Generator().manual_seed(4)
    start = [torch.randn(s, generator=g).to(dtype) for s in ((6, 5), (9,))]
    made = []
    for ours in (True, False):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        if kind == "adamw":
            o = MaskedAdamW(params, lr=LR) if ours else torch.optim.AdamW(params, lr=LR, fused=True)
        else:
            cls = MaskedSGD if ours else torch.optim.SGD
            o = cls(params, lr=LR, momentum=0.9, **({} if ours else {"fused": True}))
        made.append((params, o))
    return made


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_grad_scaler_steps_as_with_torchs_fused_optimiser(kind: str) -> None:
    """Six steps, of which two overflow: the scale goes down, and neither moves nor counts."""
    ran = []
    for params, optimizer in twins(kind):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales = []
        for step in range(6):
            g = torch.Generator().manual_seed(step)
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.randn(p.shape, generator=g) * scaler.scale(torch.ones(()))
            if step in (1, 4):
                params[0].grad[2, 3] = torch.inf
            if step == 3:  # unscaled by hand, to clip
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
            assert moved == [step not in (1, 4)] * 2
        assert not hasattr(optimizer, "grad_scale")
        ran.append((params, scales, [s.get("step") for s in optimizer.state.values()]))
    (ours, scales, steps), (theirs, its_scales, _) = ran
    assert scales == its_scales
    assert [float(step) for step in steps] == [4.0, 4.0]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_the_norm_is_of_unscaled_gradients() -> None:
    """What ``max_norm`` clips to: with a scale as without."""
    results = []
    for scale in (None, 64.0):
        p = torch.nn.Parameter(torch.arange(12.0).view(4, 3))
        o = MaskedSGD([{"params": [p], "indices": [torch.tensor([1, 3])]}], lr=1.0, max_norm=0.5)
        p.grad = torch.arange(12.0).view(4, 3) * (scale or 1)
        if scale is not None:
            o.grad_scale, o.found_inf = torch.tensor(scale), torch.tensor(0.0)
        o.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    trained = torch.arange(12.0).view(4, 3)[[1, 3]]
    moved = trained - results[0][[1, 3]]
    torch.testing.assert_close(moved, 0.5 * trained / trained.norm(), rtol=1e-5, atol=0)


def test_an_optimiser_takes_float32_gradients_of_bfloat16() -> None:
    """As stacks that accumulate in float32 give them; rows 0 and 2 train."""
    g = torch.Generator().manual_seed(5)
    start, grad = torch.randn(4, 70, generator=g).to(BF16), torch.randn(4, 70, generator=g)
    rows = torch.tensor([0, 2])
    p, q = (torch.nn.Parameter(start.to(dtype)) for dtype in (BF16, F32))
    p.grad_dtype = F32
    for each in (p, q):
        each.grad = grad.clone()
        group = {"params": [each], "indices": [rows]}
        MaskedAdamW([group], lr=1e-3, rounding="remainder", max_norm=1.0).step()
    nearest = ((q.detach().view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(BF16)
    assert torch.equal(p[rows], nearest[rows])
    assert torch.equal(p[[1, 3]], start[[1, 3]])


def test_a_step_gathers_no_gradient() -> None:
    """The operator is given the gradients themselves."""
    given: list[Tensor] = []

    class Spied(MaskedAdamW):
        def _update(self, group: dict[str, Any], call: calls.Call, scalars: Any) -> None:
            given.extend(call.grads)
            super()._update(group, call, scalars)

    p = torch.nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.ones(4, 3)
    Spied([{"params": [p], "indices": [torch.tensor([1])]}]).step()
    assert [grad.data_ptr() for grad in given] == [p.grad.data_ptr()]
    assert p.detach().any(1).tolist() == [False, True, False, False]


def test_a_device_counts_its_steps_without_anybody_waiting() -> None:
    """On the meta device, where no value can be read at all."""
    params = [torch.nn.Parameter(torch.empty(3, 4, device="meta")) for _ in "ab"]
    optimizer = MaskedAdamW(params, max_norm=1.0, rounding="stochastic")
    numbers = []
    for step in range(4):
        optimizer.grad_scale, optimizer.found_inf = (
            None if step == 3 else torch.empty((), device="meta") for _ in "ab"
        )
        for i, p in enumerate(params):
            p.grad = None if (i, step) == (1, 1) else torch.empty_like(p)
        numbers.append(len(optimizer._calls(optimizer.entries())))
        optimizer.step()
    first, second = (optimizer.state[p]["step"] for p in params)
    assert first.device.type == second.device.type == "meta"
    assert numbers == [1, 1, 2, 2]  # parted where one had no gradient


def test_steps_that_a_device_counts_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where no count is read: parameters part where one of them has no gradient."""
    monkeypatch.setattr(calls, "on_host", lambda x: False)
    ran = []
    for params, optimizer in twins("adamw"):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
        for step in range(8):
            g = torch.Generator().manual_seed(step)
            for i, p in enumerate(params):
                scaled = torch.randn(p.shape, generator=g) * scaler.scale(torch.ones(()))
                p.grad = None if (i, step) in ((0, 2), (1, 3)) else scaled
                if step in (1, 3, 5) and p.grad is not None:
                    p.grad.flatten()[1] = torch.nan
            scaler.step(optimizer)
            scaler.update()
        ran.append((params, optimizer))
    (ours, optimizer), (theirs, other) = ran
    for a, b, steps in zip(ours, theirs, (4, 5), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        assert float(optimizer.state[a]["step"]) == float(other.state[b]["step"]) == steps
    saved = [state["step"] for state in optimizer.state_dict()["state"].values()]
    assert saved[0].data_ptr() != saved[1].data_ptr()
    assert [float(step) for step in saved] == [4.0, 5.0]
