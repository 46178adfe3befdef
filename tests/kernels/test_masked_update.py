"""The masked update: frozen elements never move, trained ones follow the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ssah_kernels
from ssah_kernels import ops
from ssah_kernels.backends import cpu
from ssah_kernels.reference.masked_update import noise, noise_keys, round_stochastically

STEPS = 50
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PRECISIONS = [(F64, F64), (F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16), (F16, F32)]


def selected(param: Tensor, index: Tensor, dim: int) -> Tensor:
    return param.index_select(dim, index)


@st.composite
def updates(draw: st.DrawFn) -> dict:
    """A parameter (perhaps a slice of a larger one), what trains of it, and every option."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 40)))
    dim = draw(st.integers(0, 1))
    share = draw(st.floats(0.05, 1))
    return {
        "shape": shape,
        "dim": dim,
        "n_selected": max(1, round(share * shape[dim])),
        "precision": draw(st.sampled_from(PRECISIONS)),
        "strided": draw(st.booleans()),
        "lr": draw(st.sampled_from([1e-4, 1e-2])),
        "weight_decay": draw(st.sampled_from([0.0, 0.3])),
        "max_norm": draw(st.sampled_from([None, 0.5])),
        "accumulated": draw(st.integers(1, 3)),
        "maximize": draw(st.booleans()),
        "rounding": draw(st.sampled_from(["nearest", "stochastic"])),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def run_update(u: dict, op: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """STEPS steps, state primed beforehand. Returns the base before and after, where it may move,
    and the trained elements of a float64 run with the same gradients."""
    g = torch.Generator().manual_seed(u["seed"])
    (dtype, state), dim = u["precision"], u["dim"]
    rows, columns = u["shape"]
    base = torch.randn(rows + 2, columns + 5, generator=g, dtype=F64).to(dtype)
    if u["strided"]:
        param = base[1 : rows + 1, 2 : columns + 2]
    else:
        param = base = base[:rows, :columns].contiguous()
    index = torch.randperm(u["shape"][dim], generator=g)[: u["n_selected"]].sort().values
    before = base.clone()
    exact = [selected(param, index, dim).double()]
    exact += [torch.randn(exact[0].shape, generator=g, dtype=F64).to(state).double()]
    exact += [(torch.rand(exact[0].shape, generator=g, dtype=F64) + 0.5).to(state).double()]
    m, v = (t.to(state, copy=True) for t in exact[1:])
    seed = torch.tensor(u["seed"]) if u["rounding"] == "stochastic" else None
    lr, options = torch.tensor(u["lr"], dtype=F64), {"maximize": u["maximize"]}
    for t in range(1, STEPS + 1):
        pieces = torch.randn(u["accumulated"], *exact[0].shape, generator=g, dtype=F64).to(dtype)
        grad = pieces.sum(0)
        clip = None
        if u["max_norm"] is not None:
            norm = ops.masked_grad_norm([grad], [None], [dim])
            clip = (u["max_norm"] / (norm + 1e-6)).clamp(max=1)
        step = torch.tensor(float(t), dtype=F64)
        tail = (lr, step, None, clip)
        decay = u["weight_decay"]
        if op == "adamw":
            ops.masked_adamw_(
                [param],
                [grad],
                [m],
                [v],
                [index],
                [dim],
                *tail,
                seed,
                weight_decay=decay,
                **options,
            )
            with ssah_kernels.use("reference"):
                p64, m64, v64 = ([e] for e in exact)
                ops.masked_adamw_(
                    p64,
                    [grad.double()],
                    m64,
                    v64,
                    [None],
                    [dim],
                    *tail,
                    weight_decay=decay,
                    **options,
                )
        else:
            options |= {"momentum": 0.9, "weight_decay": decay}
            ops.masked_sgd_([param], [grad], [m], [index], [dim], *tail, seed, **options)
            with ssah_kernels.use("reference"):
                ops.masked_sgd_(
                    [exact[0]], [grad.double()], [exact[1]], [None], [dim], *tail, **options
                )
    may_move = torch.zeros(base.shape, dtype=torch.bool)
    inner = may_move[1 : rows + 1, 2 : columns + 2] if u["strided"] else may_move
    inner.index_fill_(dim, index, True)
    trained = selected(param, index, dim)
    return before, base, may_move, torch.stack([trained.double(), exact[0]])


@pytest.mark.parametrize("op", ["adamw", "sgd"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(u=updates())
def test_frozen_is_frozen_and_trained_follows_float64(op: str, u: dict) -> None:
    before, after, may_move, (trained, exact) = run_update(u, op)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[before.element_size()]
    assert torch.equal(before.view(bits)[~may_move], after.view(bits)[~may_move])
    change = (exact - before[may_move].view(exact.shape).double()).abs().max()
    spacing = torch.finfo(u["precision"][0]).eps * exact.abs().max()
    if u["precision"] == (F64, F64):
        assert (trained - exact).abs().max() <= 1e-10 * exact.abs().max()
    elif u["precision"] == (F32, F32):
        assert (trained - exact).abs().max() <= 1e-5 * change + 8 * spacing
    elif u["rounding"] == "stochastic" or u["precision"][0] == F32:
        noise_of_state = 0.1 * change if BF16 in u["precision"] else 0
        assert (trained - exact).abs().max() <= noise_of_state + 8 * STEPS**0.5 * spacing


@pytest.mark.parametrize("state", [F32, BF16])
def test_stochastic_rounding_is_unbiased(state: torch.dtype) -> None:
    """Updates far below the spacing of bfloat16: to nearest they vanish, on average they do not."""
    n, steps, lr = 40_000, 50, 1e-5
    p, exact = torch.ones(n, dtype=BF16), torch.ones(n, dtype=F64)
    m, v = torch.zeros(n, dtype=state), torch.zeros(n, dtype=state)
    m64, v64 = torch.zeros(n, dtype=F64), torch.zeros(n, dtype=F64)
    rate, grad = torch.tensor(lr, dtype=F64), torch.full((n,), -0.5, dtype=BF16)
    for t in range(1, steps + 1):
        step = torch.tensor(float(t), dtype=F64)
        ops.masked_adamw_(
            [p], [grad], [m], [v], [None], [0], rate, step, seed=torch.tensor(3), weight_decay=0.0
        )
        ops.masked_adamw_(
            [exact], [grad.double()], [m64], [v64], [None], [0], rate, step, weight_decay=0.0
        )
    for actual, expected in ((p, exact), (m, m64), (v, v64)):
        error = actual.double() - expected
        if actual.dtype == BF16 and error.std() > 0:
            z = error.mean() / (error.std() / n**0.5)
            # the parameter sees sqrt(v), which is concave: noise of v shifts it by part of itself
            shift = 2e-3 * (exact - 1).abs().mean() if actual is p and state == BF16 else 0.0
            assert error.mean().abs() <= 4 * error.std() / n**0.5 + shift, float(z)
    assert (p != 1).any()


def test_noise_is_uniform_and_independent() -> None:
    element = torch.arange(1 << 16)
    words = noise(noise_keys(5, 7, 11), element)
    others = noise(noise_keys(5, 8, 11), element)
    n = len(element)
    for i, w in enumerate(words):
        assert ((w >= 0) & (w < 1 << 16)).all()
        centred = w.double() / (1 << 16) - 0.5
        sigma = (1 / 12) ** 0.5
        assert centred.mean().abs() < 4 * sigma / n**0.5
        pairs = [words[j] for j in range(3) if j != i] + [others[i], w.roll(1)]
        for other in pairs:
            correlation = (centred * (other.double() / (1 << 16) - 0.5)).mean()
            assert correlation.abs() < 4 / 12 / n**0.5
    assert len(noise(noise_keys(5, 7, 11), element + (1 << 32))[0].unique()) > n / 2
    assert not torch.equal(noise(noise_keys(5, 7, 11), element + (1 << 32))[0], words[0])


def test_stochastic_rounding_of_special_values() -> None:
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3.3e38]
    x = torch.tensor(values * 40)
    bits = torch.full((len(x),), 0x7FFF)
    rounded = round_stochastically(x, bits)
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(rounded.isinf(), x.isinf())
    g, m, v = (torch.full_like(rounded, value) for value in (0.0, 0.0, 1.0))
    p, m = rounded.clone(), m
    args = ([p], [g], [m], [v], [None], [0], torch.tensor(0.0), torch.tensor(1.0))
    ops.masked_adamw_(*args, seed=torch.tensor(1), weight_decay=0.0)
    assert torch.equal(p.nan_to_num(), rounded.nan_to_num())  # representable: no noise shows
    grad = torch.full_like(p, float("nan"))
    ops.masked_adamw_(args[0], [grad], *args[2:], seed=torch.tensor(1))
    assert p.isnan().all()
    assert m.isnan().all()
    assert v.isnan().all()


def test_kahan_keeps_what_float16_cannot() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.randn(64, 40, generator=g).to(F16)
    exact = p.double()
    c, m, v = torch.zeros_like(p), torch.zeros(64, 40), torch.zeros(64, 40)
    m64, v64 = m.double(), v.double()
    lr = torch.tensor(1e-5)
    start = exact.clone()
    for t in range(1, STEPS + 1):
        grad = torch.randn(64, 40, generator=g).to(F16)
        step = torch.tensor(float(t))
        ops.masked_adamw_([p], [grad], [m], [v], [None], [0], lr, step, compensations=[c])
        ops.masked_adamw_([exact], [grad.double()], [m64], [v64], [None], [0], lr, step)
    error = (p.double() + c.double() - exact).abs()
    assert (error <= STEPS * 2.0 * torch.finfo(F16).eps ** 2 * start.abs() + 1e-7).all()
    assert (c.abs().double() <= torch.finfo(F16).eps * p.abs().double()).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", ["masked_adamw_", "masked_sgd_"])
@pytest.mark.parametrize("state", [F32, BF16])
def test_bfloat16_with_the_other_half_is_float32(op: str, state: torch.dtype, backend: str) -> None:
    """Bit for bit, over 20 steps of a float32 copy with the same gradients; NaN included."""
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 77, generator=g)
    whole[0, :4] = torch.tensor([1.00390625, -1.00390625, 3.4e38, float("nan")])  # two are ties
    words = whole.view(torch.int32)
    p = ((words + 0x8000) >> 16).to(torch.int16).view(BF16)
    c = (words - (p.view(torch.int16).int() << 16)).to(torch.int16)
    rows, lr, seed = torch.tensor([0, 2, 5]), torch.tensor(1e-3), torch.tensor(7)
    c = c[rows].contiguous()
    before = p.clone()
    states = {x: [torch.zeros(3, 77, dtype=state) for _ in "mv"] for x in ("half", "float32")}
    with ssah_kernels.use(backend):
        for t in range(1, 21):
            grad = torch.randn(3, 77, generator=g).to(BF16)
            step = torch.tensor(float(t))
            for name, param, gradient, rest in (
                ("half", p, grad, [c]),
                ("float32", whole, grad.float(), None),
            ):
                args = ([rows], [0], lr, step, None, None, seed, rest)
                kept = [[s] for s in states[name]][: 2 if op == "masked_adamw_" else 1]
                more = {"betas": (0.9, 0.99)} if op == "masked_adamw_" else {"momentum": 0.9}
                getattr(ops, op)([param], [gradient], *kept, *args, **more, weight_decay=0.1)
    # As one word: the carry of the lower half is what makes p the nearest.
    joined = (p[rows].view(torch.int16).int() << 16) + c.int()
    numbers = ~whole[rows].isnan()
    assert torch.equal(joined[numbers], whole[rows].view(torch.int32)[numbers])
    assert joined.view(F32)[~numbers].isnan().all()
    assert p[rows][~numbers].isnan().all()
    nearest = (p[rows].double() - whole[rows].double()).abs()
    others = torch.stack([p[rows].nextafter(p.new_full((), x)) for x in (torch.inf, -torch.inf)])
    assert ((nearest <= (others.double() - whole[rows].double()).abs().amin(0)) | ~numbers).all()
    assert torch.equal(p[[1, 3, 4]], before[[1, 3, 4]])
    for a, b in zip(*states.values(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def multiply_add(a: Tensor, b: float | Tensor, c: Tensor) -> Tensor:
    """a * b + c in float32: rounded once where the kernels fuse the two, else twice."""
    b = torch.as_tensor(b, dtype=F32)
    if cpu.facts()["isa"] == "baseline":
        return a * b + c
    product, addend = a.double() * b.double(), c.double()  # the product is exact
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    # To odd: rounding once more, to float32, is then as if the sum had been exact.
    even = total.view(torch.int64) % 2 == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where((error != 0) & even, total.nextafter(towards), total).float()


def adamw_tensors() -> list[Tensor]:
    """A parameter, its gradient and its two states, of the sizes that training has."""
    torch.manual_seed(0)
    scales = torch.tensor([0.02, 1e-3, 1e-3])[:, None, None]
    return [*(torch.randn(3, 97, 65) * scales), torch.rand(97, 65) * 1e-6]


LR, DECAY, EPS, STEP, BETA1, BETA2 = 1e-4, 0.1, 1e-8, 4, 0.9, 0.999


def masked_adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    rate, step = torch.tensor(LR, dtype=F64), torch.tensor(float(STEP))
    ops.masked_adamw_([p], [g], [m], [v], [None], [0], rate, step, weight_decay=DECAY)


def test_float32_is_rounded_as_the_source_says() -> None:
    """To the bit, whatever the compiler, its version and its options."""
    p, g, m, v = adamw_tensors()
    m_then = multiply_add(g - m, 1 - BETA1, m)
    v_then = multiply_add(g * (1 - BETA2), g, v * BETA2)
    root = v_then.double().sqrt().float()  # torch's own of float32 need not be the nearest
    denominator = root / math.sqrt(1 - BETA2**STEP) + EPS
    p_then = p * (1 - LR * DECAY) - m_then * (LR / (1 - BETA1**STEP)) / denominator
    masked_adamw(p, g, m, v)
    for actual, expected in ((m, m_then), (v, v_then), (p, p_then)):
        assert torch.equal(actual, expected)


def test_float32_equals_torch_fused() -> None:
    """Up to roundings: which products and sums torch fuses depends on its build."""
    before = adamw_tensors()
    (p, g, m, v), (q, _, m2, v2) = ([t.clone() for t in before] for _ in "ab")
    options = {"beta1": BETA1, "beta2": BETA2, "weight_decay": DECAY, "eps": EPS, "lr": LR}
    step = [torch.tensor(float(STEP))]
    torch._fused_adamw_([p], [g], [m], [v], [], step, amsgrad=False, maximize=False, **options)
    masked_adamw(q, *before[1:2], m2, v2)
    # What one rounding is to the terms of each sum, which may cancel, and how many there are in
    # the two runs together: 3 of m; 4 of v; 2 of the weight, and 10 of its change (3 of m, half of
    # v's 4, one each of the two products, square root, sum and division, and a second product).
    rounding = torch.finfo(F32).eps / 2
    of_m = before[2].abs() + (1 - BETA1) * (g - before[2]).abs()
    of_p = before[0].abs()
    change = LR / (1 - BETA1**STEP) * of_m / (v.sqrt() / math.sqrt(1 - BETA2**STEP) + EPS)
    assert ((m2 - m).abs() <= 2 * 3 * rounding * of_m).all()
    assert ((v2 - v).abs() <= 2 * 4 * rounding * v).all()
    assert ((q - p).abs() <= 2 * rounding * (2 * of_p + 10 * change)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": []}, ValueError, "params is empty"),
        ({"grads": [torch.zeros(3, 3)]}, ValueError, r"grads\[0\] has shape"),
        ({"grads": [torch.zeros(2, 3).double()]}, TypeError, r"grads\[0\] has dtype"),
        ({"exp_avgs": [torch.zeros(2, 3).half()]}, TypeError, r"exp_avgs\[0\] has dtype"),
        ({"exp_avgs": [torch.zeros(3, 2).t()]}, ValueError, "must be contiguous"),
        ({"indices": [torch.tensor([0.0, 1.0])]}, ValueError, r"indices\[0\] is torch.float32"),
        (
            {"indices": [torch.tensor([0, 4])]},
            ValueError,
            r"indices\[0\] goes from 0 to 4; it must stay within 0 to 3",
        ),
        ({"indices": [torch.tensor([1, 0])]}, ValueError, r"indices\[0\] has 0 after 1"),
        ({"indices": [torch.tensor([1, 1])]}, ValueError, r"indices\[0\] has 1 after 1"),
        ({"dims": [2]}, ValueError, "dims has 2"),
        ({"lr": torch.zeros(2)}, ValueError, "lr is torch.float32 of shape"),
        ({"seed": torch.tensor(1.0)}, ValueError, "seed is torch.float32"),
        ({"compensations": [torch.zeros(2, 3)]}, TypeError, "must be bfloat16 or float16"),
        ({"signed": [torch.zeros(2).double()]}, ValueError, "given together"),
    ],
)
def test_operator_names_the_wrong_argument(change: dict, error: type, message: str) -> None:
    args = {
        "params": [torch.zeros(4, 3)],
        "grads": [torch.zeros(2, 3)],
        "exp_avgs": [torch.zeros(2, 3)],
        "exp_avg_sqs": [torch.zeros(2, 3)],
        "indices": [torch.tensor([0, 2])],
        "dims": [0],
        "lr": torch.tensor(0.1),
        "step": torch.tensor(1.0),
    }
    with pytest.raises(error, match=message):
        ops.masked_adamw_(**(args | change))


def test_gradient_norm_is_of_what_trains() -> None:
    g = torch.randn(50, 30)
    rows = torch.tensor([0, 3, 49])
    actual = ops.masked_grad_norm([g, g.t()], [rows, rows], [0, 1], torch.tensor(2.0))
    assert torch.isclose(actual, g[rows].double().norm() * 2**0.5 / 2, rtol=1e-12)
    huge = torch.full((10,), 1e30)
    assert torch.isclose(
        ops.masked_grad_norm([huge], [None], [0]), huge.double().norm(), rtol=1e-12
    )


def test_compiles_without_graph_break() -> None:
    def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, index: Tensor) -> Tensor:
        norm = ops.masked_grad_norm([g], [None], [0])
        clip = (1 / norm).clamp(max=1)
        ops.masked_adamw_(
            [p], [g], [m], [v], [index], [0], torch.tensor(0.1), norm * 0 + 1, None, clip
        )
        return norm

    torch.manual_seed(0)
    index = torch.tensor([1, 4])
    eager = [torch.randn(6, 5), torch.randn(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)]
    traced = [t.clone() for t in eager]
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert torch.equal(update(*eager, index), compiled(*traced, index))
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)
