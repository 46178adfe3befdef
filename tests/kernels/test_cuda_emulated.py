"""The CUDA kernels, executed on the CPU through the emulation (tests/emulation)."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, check_skipped, copied, results
from emulation.build import Emulation
from emulation.compare import checked, equals_reference, kept_in
from native_calls import call_of, leaked, outcomes
from torch import Tensor

from ssah_kernels import backends
from ssah_kernels.ops import new_moments
from ssah_kernels.schema import KERNELS

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.xdist_group("emulation"),  # one process builds each library once
]


@pytest.fixture(scope="module")
def emulated(pytestconfig: pytest.Config) -> Emulation:
    return Emulation(kept_in(pytestconfig))


@pytest.fixture(autouse=True)
def poisoned_memory_and_one_thread() -> Iterator[None]:
    """New tensors, results and workspaces among them, start as NaN."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("op", KERNELS)
def test_equals_reference(op: str, emulated: Emulation) -> None:
    emulated[op].seed(1)
    assert equals_reference(emulated[op]) > 40


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=[] if dtype in DTYPES[1:3] else pytest.mark.exhaustive)
        for dtype in DTYPES
    ],
)
@pytest.mark.parametrize("op", KERNELS)
def test_equals_reference_beyond_the_first_tile(
    op: str, dtype: torch.dtype, emulated: Emulation
) -> None:
    emulated[op].seed(2)
    assert equals_reference(emulated[op], dtypes=(dtype,), which="far") > 1


@pytest.mark.parametrize("op", KERNELS)
def test_equals_reference_at_the_ends_of_the_range(op: str, emulated: Emulation) -> None:
    assert equals_reference(emulated[op], which="extreme_of_float32") > 0


def moments(emulated: Emulation, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    state = new_moments(x)
    emulated["channel_moments_"](x, *state, mask)
    return state


def reference_moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    state = new_moments(x)
    backends.kernel("reference", "channel_moments_")(x, *state, mask)
    return state


def test_same_bits_in_any_order(emulated: Emulation) -> None:
    x = torch.randn(300, 520, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.arange(300) % 7 != 3
    runs = []
    for seed in range(4):
        emulated["channel_moments_"].seed(seed)
        runs.append(torch.cat([s.flatten() for s in moments(emulated, x, mask)]))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_bits_from_unaligned_memory(dtype: torch.dtype, emulated: Emulation) -> None:
    x = torch.randn(200, 528, generator=torch.Generator().manual_seed(0)).to(dtype)
    for shift in (1, 3):
        padded = torch.full((200, 536), float("nan"), dtype=dtype)
        unaligned = padded[:, shift : shift + 528]
        unaligned.copy_(x)
        for a, b in zip(moments(emulated, x), moments(emulated, unaligned), strict=True):
            assert torch.equal(a, b)


def test_large_mean(emulated: Emulation) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(1000, 40, generator=g, dtype=torch.float64) + 1e4).float()
    _, mean, m2 = moments(emulated, x)
    _, expected_mean, expected_m2 = reference_moments(x)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(m2, expected_m2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", [0, 1, 5, 64])
def test_massive_first_token(first: int, emulated: Emulation) -> None:
    """A first row that dwarfs the others, as language models have, costs no digits."""
    x = torch.randn(512, 33, generator=torch.Generator().manual_seed(first))
    x[first] *= 1000
    mask = torch.arange(512) >= first
    _, mean, m2 = moments(emulated, x, mask)
    _, expected_mean, expected_m2 = reference_moments(x, mask)
    torch.testing.assert_close(m2, expected_m2, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "mantissa", "unequal"), [(torch.bfloat16, 8, 4e-3), (torch.float16, 11, 2e-2)]
)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_approximations_vanish_in_the_rounding_of_16_bits(
    act: str, dtype: torch.dtype, mantissa: int, unequal: float, emulated: Emulation
) -> None:
    """Of every gate from -20 to 20 the value and the slope, beside those of float64."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = gate[gate.double().abs() <= 20].view(-1, 1)
    one = torch.ones_like(gate)
    value = checked(emulated["gated_moments"])(gate, one, *new_moments(gate), act=act)
    slope, _ = checked(emulated["gated_moments_backward"])(one, gate, one, act=act)
    z = gate.double().requires_grad_()
    exact = torch.nn.functional.silu(z) if act == "silu" else gelu_by_tanh(z)
    (exact_slope,) = torch.autograd.grad(exact.sum(), z)
    for got, expected in ((value, exact), (slope, exact_slope)):
        rounded = expected.detach().to(dtype)
        assert (got != rounded).double().mean() < unequal
        # Where a root of the slope is near, the error is relative to 1.
        room = expected.detach().abs() * 2.0**-mantissa + 1e-6
        assert ((got.double() - expected.detach()).abs() <= room).all()


def gelu_by_tanh(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_a_large_mean_in_16_bits(dtype: torch.dtype, emulated: Emulation) -> None:
    """Values are not shifted: of two neighbouring numbers in turn the variance is exact."""
    low = torch.tensor([100.0, 1.0, -300.0, torch.finfo(dtype).max / 4], dtype=dtype)
    high = torch.nextafter(low, torch.tensor(torch.inf, dtype=dtype))
    high[3] = low[3]  # of a constant it is 0, however large
    x = torch.stack([low, high, low, low] * 100)
    for actual, expected in zip(moments(emulated, x), reference_moments(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)


def test_a_root_of_nothing_divides_nothing(emulated: Emulation) -> None:
    """A weight of 16 bits whose gradients were too small to square stays where it is."""
    p = torch.ones(1, 8, dtype=torch.bfloat16)
    tiny = torch.full_like(p, 1e-30)
    lists = ([p], [tiny], [torch.zeros_like(p)], [torch.zeros_like(p)], [None], [0])
    scalars = (torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    checked(emulated["masked_adamw_"])(*lists, *scalars, eps=0.0)
    assert torch.equal(p, torch.ones_like(p))


def test_every_element_is_read_once(emulated: Emulation) -> None:
    x = torch.randn(100, 512).bfloat16()
    size = x.numel() * x.element_size()
    mask = torch.arange(100) % 4 == 0
    state = new_moments(x)
    sums = torch.zeros(2, 512, dtype=torch.float64)
    calls: list[tuple[str, tuple[Any, ...], float]] = [
        ("channel_moments_", (x, *state), 1),
        ("channel_moments_", (x, *state, mask), 0.25),
        ("gated_moments", (x, x, *state), 2),
        ("gated_moments", (x, x, *state, mask), 2),
        ("gated_moments_backward", (x, x, x), 3),
        ("taylor_moments_", (x, x, *sums), 2),
        ("taylor_moments_", (x, x, *sums, mask), 0.5),
        ("column_sq_norms", (x,), 1),
    ]
    # 100 rows are three chunks of 8 warps and one of 4. Each warp reads the factors of its only arm
    # once, which are of float32: as much as two rows of x.
    factors, arm = torch.ones(1, 512), torch.zeros(100, dtype=torch.int64)
    calls.append(("gated_product", (x, x, factors, arm), 2 + (3 * 8 + 4) * 2 / 100))
    for op, args, tensors in calls:
        emulated[op].take_bytes_read()
        emulated[op](*args)
        assert emulated[op].take_bytes_read() == tensors * size, (op, args)


def test_host_functions_refuse_what_would_harm_memory(emulated: Emulation) -> None:
    x = torch.zeros(3, 8)
    count, mean, m2 = new_moments(x)
    call = emulated["channel_moments_"]
    with pytest.raises(RuntimeError, match="mean must be contiguous float64 with 8 elements"):
        call(x, count, mean[:4], m2)
    with pytest.raises(RuntimeError, match="contiguous in its last dimension"):
        call(x.T, count, new_moments(x.T)[1], new_moments(x.T)[2])
    with pytest.raises(RuntimeError, match="token_mask"):
        call(x, count, mean, m2, torch.ones(4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="act is 5; it must be from 0 to 4"):
        getattr(torch.ops, emulated["gated_moments"].namespace).gated_moments(
            x, x, count, mean, m2, act=5
        )


@pytest.mark.parametrize("op", KERNELS)
def test_what_would_harm_memory_is_refused(op: str, emulated: Emulation) -> None:
    """Each kind of wrong argument to the bare host function, which anybody can call."""
    found = outcomes(op, getattr(getattr(torch.ops, emulated[op].namespace), op).default)
    assert {name: what for name, what in found.items() if what == "accepted"} == {}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no mallinfo2 (glibc 2.33)")
@pytest.mark.parametrize("op", ["gated_moments", "gated_moments_backward"])
def test_the_heap_is_flat(op: str, emulated: Emulation) -> None:
    args, kwargs = call_of(op)
    assert leaked(lambda: emulated[op](*args, **kwargs), 200) < 4_800


def test_every_byte_but_zero_in_a_mask_is_true(emulated: Emulation) -> None:
    number = torch.arange(256)
    x = torch.randn(256, 24)
    by_bytes = moments(emulated, x, number.to(torch.uint8).view(torch.bool))
    for actual, expected in zip(by_bytes, moments(emulated, x, number != 0), strict=True):
        assert torch.equal(actual, expected)
    assert by_bytes[0] == 255


@pytest.mark.parametrize("op", ["masked_adamw_", "masked_sgd_"])
def test_nothing_but_the_trained_elements_is_written(op: str, emulated: Emulation) -> None:
    """Memory around a parameter, and its frozen elements, keep their bits."""
    for sample in CASES[op].samples(torch.bfloat16):
        args = [copied(a) if i in CASES[op].outputs else a for i, a in enumerate(sample.args)]
        checked(emulated[op])(*args, **sample.kwargs)
        lists = (sample.args[0], args[0], *(args[3:5] if op == "masked_sgd_" else args[4:6]))
        for before, after, index, dim in zip(*lists, strict=True):
            memory = [
                torch.empty(0, dtype=p.dtype).set_(p.untyped_storage()) for p in (before, after)
            ]
            trained = torch.zeros(memory[0].shape, dtype=torch.bool)
            view = trained.as_strided(before.shape, before.stride(), before.storage_offset())
            view.fill_(True) if index is None else view.index_fill_(dim, index, True)
            assert torch.equal(memory[0][~trained], memory[1][~trained])
            assert trained.sum() < 10 or not torch.equal(memory[0], memory[1])


@pytest.mark.parametrize("op", ["masked_adamw_", "masked_sgd_"])
def test_nothing_is_written_where_a_gradient_overflowed(op: str, emulated: Emulation) -> None:
    for sample in CASES[op].samples(torch.bfloat16):
        check_skipped(CASES[op], checked(emulated[op]), sample)


@pytest.mark.parametrize("op", ["masked_adamw_", "masked_grad_norm"])
def test_lists_give_the_same_bits_in_any_order(op: str, emulated: Emulation) -> None:
    sample = next(islice(CASES[op].samples(torch.bfloat16), 1, None))  # noise and importance
    runs = []
    for seed in range(3):
        emulated[op].seed(seed)
        runs.append(results(CASES[op], checked(emulated[op]), sample))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_an_index_beyond_the_parameter_stops_the_launch(emulated: Emulation) -> None:
    grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="trap"):
        checked(emulated["masked_grad_norm"])([grad], [torch.tensor([1, 4])], [0])


@pytest.mark.parametrize("op", [op for op in KERNELS if op.startswith("masked")])
def test_capture_into_a_graph_is_refused(op: str, emulated: Emulation) -> None:
    """A replay would read the host's table after it was freed."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.ssah, op).default.tags
    sample = next(CASES[op].samples(torch.float32))
    args = [copied(a) for a in sample.args]
    emulated[op].capture(True)
    with pytest.raises(RuntimeError, match=r"outside torch\.cuda\.graph"):
        checked(emulated[op])(*args, **sample.kwargs)
    emulated[op].capture(False)
    for before, after in zip(sample.args[0], args[0], strict=True):
        assert torch.equal(before, after)
    checked(emulated[op])(*args, **sample.kwargs)


@pytest.mark.parametrize("op", ["masked_grad_norm", "bit_masked_adamw_"])
def test_more_calls_than_the_ring_of_tables_has_pieces(op: str, emulated: Emulation) -> None:
    """Each copies its table from pinned memory, else the emulation refuses; larger ones grow it."""
    call, sample = checked(emulated[op]), next(CASES[op].samples(torch.float32))
    expected = results(CASES[op], call, sample)
    for number in range(70):
        if op == "masked_grad_norm" and number % 3 == 0:
            n = 1 + number
            assert call([torch.ones(4, 4)] * n, [None] * n, [0] * n).item() == 4 * n**0.5
    for found, must in zip(results(CASES[op], call, sample), expected, strict=True):
        assert torch.equal(found, must)


def test_large_gradients_do_not_overflow(emulated: Emulation) -> None:
    norm = checked(emulated["masked_grad_norm"])([torch.full((3, 50), 1e38)], [None], [0])
    assert norm.item() == pytest.approx(150**0.5 * 1e38, rel=1e-6)
