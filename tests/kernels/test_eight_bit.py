"""State in 8 bits: the map, the nearest code, what an update keeps of state, the optimisers."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from update_samples import all_sides_of_all_bounds

import ssah_kernels
from ssah_kernels import ops
from ssah_kernels.dynamic_map import dequantize, dynamic_map
from ssah_kernels.optim import MaskedAdamW, MaskedSGD

F64, F32, BF16, U8 = torch.float64, torch.float32, torch.bfloat16, torch.uint8
ALL = 256


def magnitudes(fraction_bits: int) -> list[float]:
    """By the paper's words: the number of leading zeros is the decade, what follows the first 1 is
    a fraction, which goes linearly from 0.1 to 1."""
    values = [0.0, 1.0]
    for byte in range(1, 1 << (7 + fraction_bits)):
        width = byte.bit_length() - 1
        if width < fraction_bits:
            continue  # the map without signs has one bit of fraction more in every decade
        ends = torch.linspace(0.1, 1, 2**width + 1, dtype=F64)
        middle = (ends[:-1] + ends[1:])[byte - 2**width].item() / 2
        values.append(middle * 10.0 ** (width - fraction_bits - 6))
    return sorted(values)


SIGNED = torch.tensor(magnitudes(0), dtype=F64)
SIGNED = torch.cat([-SIGNED[1:-1].flip(0), SIGNED])  # [256], in order
UNSIGNED = torch.tensor(magnitudes(1), dtype=F64)


@pytest.mark.parametrize(("signed", "ours"), [(True, SIGNED), (False, UNSIGNED)])
def test_the_map_is_that_of_the_paper(signed: bool, ours: Tensor) -> None:
    values = dynamic_map(signed=signed).values
    assert values.shape == ours.shape == (ALL,)
    assert values[0] == 0
    assert torch.equal(values.sort().values, ours.float())


def stored_momentum(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of momentum ``x`` [rows, columns]: at the first step it is the gradient."""
    codes, scales = (
        torch.full(x.shape, 77, dtype=U8),
        torch.full((len(x), -(-x.shape[1] // ALL)), 9.0),
    )
    one = torch.tensor(1.0, dtype=F64)
    ops.masked_sgd_(
        [torch.zeros_like(x)],
        [x],
        [codes],
        [None],
        [0],
        one,
        one,
        momentum_scales=[scales],
        momentum=0.9,
    )
    return codes, scales


def stored_moment(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(squares, codes, scales) of second moments that are the squares of ``x``: beta2 is 0."""
    codes, unused = torch.zeros(x.shape, dtype=U8), torch.zeros(x.shape, dtype=U8)
    scales, more = (torch.zeros(len(x), -(-x.shape[1] // ALL)) for _ in "mv")
    one = torch.tensor(1.0, dtype=F64)
    ops.masked_adamw_(
        [torch.zeros_like(x)],
        [x],
        [unused],
        [codes],
        [None],
        [0],
        one * 0,
        one,
        exp_avg_scales=[more],
        exp_avg_sq_scales=[scales],
        betas=(0.0, 0.0),
    )
    return x * x, codes, scales


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_code_is_that_of_the_nearest_value(backend: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(30, 700) * 10.0 ** (torch.rand(30, 700) * 8 - 8)
    with ssah_kernels.use(backend):
        for x in (wide, all_sides_of_all_bounds(signed=True)):
            codes, scales = stored_momentum(x)
            check_nearest(x, codes, scales, signed=True)
            assert (codes[x == 0] == 0).all()
        squares, codes, scales = stored_moment(wide.abs())
        check_nearest(squares, codes, scales, signed=False)
        assert (codes[squares > 1e-30] > 0).all()  # none becomes 0


def check_nearest(x: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    values = SIGNED if signed else UNSIGNED
    for row in range(len(x)):
        for block, scale in enumerate(scales[row]):
            own = slice(block * ALL, (block + 1) * ALL)
            assert scale == x[row, own].abs().max()
            y = (x[row, own] / scale).double()
            distance = (y[:, None] - values).abs()  # [elements, codes]
            if not signed:
                distance[:, 0] = torch.where(y > 0, torch.inf, distance[:, 0])
            chosen = dynamic_map(signed=signed).values.double()[codes[row, own].long()]
            # The middle of two values is rounded to float32, as the values are.
            spare = torch.finfo(F32).eps * (y.abs() + chosen.abs())
            assert ((chosen - y).abs() <= distance.min(1).values + spare).all()


def test_halfway_goes_towards_zero() -> None:
    x = all_sides_of_all_bounds(signed=True)
    codes, _ = stored_momentum(x)
    with ssah_kernels.use("reference"):
        expected, _ = stored_momentum(x)
    assert torch.equal(codes, expected), "on a bound or beside it"
    bound = dynamic_map(signed=True).bounds[40]
    pair, _ = stored_momentum(torch.stack([torch.ones(()), bound, -bound])[None])
    assert pair.tolist() == [[128, 40, 256 - 40]]


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_blocks_of_zeros_tiny_and_infinite_values(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 2 * ALL, dtype=dtype)
    x[1] = torch.linspace(-1, 1, 2 * ALL).to(dtype) * 1e-40  # below the normal numbers of float32
    x[2, 5], x[3, 5] = float("inf"), float("nan")
    x[2:, ALL:] = 1
    codes, scales = stored_momentum(x)
    assert (codes[0] == 0).all()
    assert (scales[0] == 0).all()
    back = dequantize(codes, scales, signed=True)
    assert (back[0] == 0).all()
    assert ((back[1] - x[1].float()).abs() <= 0.0075 * 1e-40).all()
    assert back[2:, :ALL].isnan().all(), "a block that is infinite somewhere"
    assert (back[2:, ALL:] == 1).all(), "the block beside it"


def half_gap(y: Tensor, values: Tensor) -> Tensor:
    """The most that the nearest of ``values`` [256] can be away from each of ``y`` [...]."""
    at = torch.searchsorted(values, y).clamp(1, len(values) - 1)
    return (values[at] - values[at - 1]) / 2


def test_a_step_is_adamw_of_what_was_read_within_the_quantiser_s_bound() -> None:
    torch.manual_seed(1)
    p = torch.randn(20, 300, dtype=F64)
    codes, scales = (
        [torch.zeros(20, 300, dtype=U8) for _ in "mv"],
        [torch.zeros(20, 2) for _ in "mv"],
    )
    b1, b2, lr, eps = 0.9, 0.999, 1e-2, 1e-8
    for t in range(1, 30):
        g = torch.randn(20, 300, dtype=F64) * torch.rand(20, 1, dtype=F64)
        before = p.clone()
        m, v = (
            dequantize(c, s, signed=i == 0).double()
            for i, (c, s) in enumerate(zip(codes, scales, strict=True))
        )
        step = torch.tensor(float(t), dtype=F64)
        ops.masked_adamw_(
            [p],
            [g],
            [codes[0]],
            [codes[1]],
            [None],
            [0],
            torch.tensor(lr, dtype=F64),
            step,
            exp_avg_scales=[scales[0]],
            exp_avg_sq_scales=[scales[1]],
            weight_decay=0.0,
        )
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        expected = before - lr / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + eps)
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
        for i, (exact, values) in enumerate(((m, SIGNED), (v, UNSIGNED))):
            most = scales[i].double().repeat_interleave(ALL, 1)[:, :300]
            stored = dequantize(codes[i], scales[i], signed=i == 0).double()
            # Rounding y and the values to float32 comes on top of it.
            bound = half_gap(exact / most, values) + 1e-6
            assert ((stored - exact).abs() <= bound * most).all()


def rows(n: int, columns: int, dtype: torch.dtype = F32) -> nn.Parameter:
    return nn.Parameter(
        torch.randn(n, columns, generator=torch.Generator().manual_seed(n)).to(dtype)
    )


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for t in steps:
        for p in params:
            g = torch.Generator().manual_seed(t)
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("make", [MaskedAdamW, MaskedSGD])
def test_state_is_small_and_of_what_trains_alone(make: type) -> None:
    p, bias, short = rows(10, 600), nn.Parameter(torch.ones(9)), rows(4, 63)
    more = {"momentum": 0.9} if make is MaskedSGD else {}
    group = {"params": [p, bias, short], "indices": [torch.tensor([1, 4, 7]), None, None]}
    optimizer = make([group], lr=0.1, state_dtype="8bit", **more)
    frozen = p.detach().clone()
    train(optimizer, [p, bias, short], range(3))
    states = [
        {k: v for k, v in optimizer.state[each].items() if k != "step"} for each in (p, bias, short)
    ]
    per_state = 3 * 600 + 3 * 3 * 4  # codes, and a scale for 256, 256 and 88 elements of each row
    n = 1 if make is MaskedSGD else 2
    assert sum(v.nbytes for v in states[0].values()) == n * per_state
    assert optimizer.state_bytes() == n * (per_state + 4 * 9 + 4 * 4 * 63)
    assert all(v.dtype == F32 for state in states[1:] for v in state.values())
    still = [0, 2, 3, 5, 6, 8, 9]
    assert torch.equal(p[still].view(torch.int32), frozen[still].view(torch.int32))
    assert (p[[1, 4, 7]] != frozen[[1, 4, 7]]).all()


def test_rows_in_several_parameters_get_the_same_numbers() -> None:
    """As they do on several ranks; and as columns of a transposed parameter."""
    whole = rows(10, 300).detach()
    turned = whole.t().contiguous().t()  # lies by columns
    runs = [[whole.clone()], [whole[:6].clone(), whole[6:].clone()], [turned]]
    found = []
    for tensors in runs:
        params = [nn.Parameter(t) for t in tensors]
        o = MaskedAdamW(params, lr=0.1, state_dtype="8bit")
        for t in range(4):
            grad = torch.randn(10, 300, generator=torch.Generator().manual_seed(t))
            for p, g in zip(params, grad.split([len(p) for p in params]), strict=True):
                p.grad = g.clone()
            o.step()
        names = ("exp_avg", "exp_avg_scales", "exp_avg_sq", "exp_avg_sq_scales")
        states = [torch.cat([o.state[p][name] for p in params]) for name in names]
        found.append([torch.cat([p.detach() for p in params]), *states])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("make", [MaskedAdamW, MaskedSGD])
def test_a_resumed_run_equals_an_uninterrupted_one(make: type) -> None:
    def optimizer() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        params = [rows(6, 300, BF16), rows(5, 100, BF16), nn.Parameter(torch.ones(7, dtype=BF16))]
        more = {"momentum": 0.9} if make is MaskedSGD else {}
        return params, make(params, lr=0.01, state_dtype="8bit", rounding="stochastic", **more)

    whole, o = optimizer()
    train(o, whole, range(6))
    first, o = optimizer()
    train(o, first, range(3))
    file = io.BytesIO()
    torch.save([o.state_dict(), [p.data for p in first]], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed, o = optimizer()
    for p, w in zip(resumed, weights, strict=True):
        p.data.copy_(w)
    o.load_state_dict(state)
    assert o.state[resumed[0]][o.state_names[0]].dtype == U8
    train(o, resumed, range(3, 6))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


def test_scales_of_other_units_are_refused() -> None:
    saved, other = rows(6, 300), rows(6, 300)
    first, second = (MaskedAdamW([p], state_dtype="8bit") for p in (saved, other))
    train(first, [saved], range(1))
    state = first.state_dict()
    state["state"][0]["exp_avg_scales"] = torch.zeros(6, 3)
    with pytest.raises(ValueError, match=r"exp_avg_scales of parameter 0 has shape \[6, 3\]"):
        second.load_state_dict(state)


def test_same_bits_with_one_and_two_threads() -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p = rows(300, 700)
        optimizer = MaskedAdamW([p], lr=0.1, state_dtype="8bit")
        train(optimizer, [p], range(2))
        found.append([p.detach(), *optimizer.state[p].values()])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exp_avg_sq_scales": None}, ValueError, "must be given together"),
        (
            {"exp_avg_scales": [torch.zeros(2, 2)]},
            ValueError,
            r"exp_avg_scales\[0\] has shape \(2, 2\)",
        ),
        ({"exp_avg_scales": [torch.zeros(2, 1, dtype=F64)]}, TypeError, "must be float32"),
        ({"exp_avgs": [torch.zeros(2, 3)]}, TypeError, r"exp_avgs\[0\] has dtype torch.float32"),
        ({"exp_avg_scales": None, "exp_avg_sq_scales": None}, TypeError, "has dtype torch.uint8"),
    ],
)
def test_the_wrong_argument_is_named(change: dict, error: type, message: str) -> None:
    args = {
        "params": [torch.zeros(2, 3)],
        "grads": [torch.zeros(2, 3)],
        "exp_avgs": [torch.zeros(2, 3, dtype=U8)],
        "exp_avg_sqs": [torch.zeros(2, 3, dtype=U8)],
        "indices": [None],
        "dims": [0],
        "lr": torch.tensor(0.1),
        "step": torch.tensor(1.0),
        "exp_avg_scales": [torch.zeros(2, 1)],
        "exp_avg_sq_scales": [torch.zeros(2, 1)],
    }
    with pytest.raises(error, match=message):
        ops.masked_adamw_(**(args | change))
