"""The rules that hold for every operator: catalogue, opcheck, compilation, determinism, numerics,
errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import ACTIVATIONS, CASES, copied, moments_state, results

import ssah_kernels
from ssah_kernels import backends, checks, fake, ops
from ssah_kernels.schema import KERNELS, SCHEMAS


@pytest.mark.parametrize("op", SCHEMAS)
def test_catalogue_is_complete(op):
    assert op in CASES
    assert callable(getattr(fake, op))
    assert callable(getattr(checks, op))
    if op in KERNELS:
        assert callable(backends.kernel("reference", op))
        module = importlib.import_module(f"ssah_kernels.reference.{backends.stem(op)}")
        assert module.__doc__
    public = op.removesuffix("_backward")
    assert getattr(ops, public).__doc__


@pytest.mark.parametrize("op", CASES)
def test_opcheck(op):
    samples = [s for s in CASES[op].samples(torch.float32) if "expanded" not in s.name]
    for sample in samples[1:2] if "masked" in op else samples[:6:2]:
        args = tuple(copied(a) for a in sample.args)
        torch.library.opcheck(getattr(torch.ops.ssah, op).default, args, sample.kwargs)


def test_compiles_without_graph_break():
    def score(gate, up, grad, weight, mask, count, mean, m2, signed, squared):
        h = ops.gated_moments(gate, up, count, mean, m2, mask, act="gelu")
        ops.channel_moments_(h, count, mean, m2, mask)
        ops.taylor_moments_(h, grad, signed, squared, mask)
        return h, ops.column_sq_norms(weight)

    torch.manual_seed(0)
    gate, up, grad = torch.randn(3, 4, 10, 24)
    mask = torch.rand(4, 10) < 0.7
    states = [[*ops.new_moments(gate), *(torch.zeros(24).double() for _ in "ab")] for _ in "ab"]
    weight = torch.randn(5, 24)
    eager = score(gate, up, grad, weight, mask, *states[0])
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")(
        gate, up, grad, weight, mask, *states[1]
    )
    for a, b in zip([*eager, *states[0]], [*compiled, *states[1]], strict=True):
        assert torch.equal(a, b)
    assert states[0][0] == 2 * mask.sum()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradient_of_gated_moments(act):
    torch.manual_seed(1)
    gate, up = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in "ab")

    def output(gate, up):
        return ops.gated_moments(gate, up, *ops.new_moments(gate), act=act)

    assert torch.autograd.gradcheck(output, (gate, up))
    state = ops.new_moments(gate)
    ops.gated_moments(gate, up, *state, act=act)
    assert not any(s.requires_grad for s in state)
    with torch.no_grad():
        plain = ops.new_moments(gate)
        ops.gated_moments(gate, up, *plain, act=act)
    for a, b in zip(state, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_state_never_joins_the_graph():
    x = torch.randn(4, 3, requires_grad=True)
    state = ops.new_moments(x)
    ops.channel_moments_(x, *state)
    ops.taylor_moments_(x, x, state[1], state[2])
    assert not any(s.requires_grad for s in state)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_large_offset_keeps_the_variance(backend):
    torch.manual_seed(2)
    x = (torch.randn(3000, 40) + 1e4 * torch.linspace(0.5, 1, 40)).float()
    expected = x.double().var(0)
    state = ops.new_moments(x)
    with ssah_kernels.use(backend):
        for part in x.split([1, 7, 992, 2000]):
            ops.channel_moments_(part, *state)
    variance = state[2] / (state[0] - 1)
    assert ((variance - expected).abs() / expected).max() < 1e-4


def test_outliers_do_not_spoil_the_rest():
    """Massive activations: one token, a thousand deviations off, first of the data set."""
    torch.manual_seed(3)
    x = torch.randn(700, 33)
    x[0] = 4000.0
    for split in ([700], [1, 699], [350, 350]):
        state = ops.new_moments(x)
        for part in x.split(split):
            ops.channel_moments_(part, *state)
        torch.testing.assert_close(state[2], x.double().var(0) * 699, rtol=1e-6, atol=0)


def test_another_split_differs_by_a_millionth_at_most():
    torch.manual_seed(4)
    x = torch.randn(2048, 64) * torch.logspace(-3, 3, 64) + torch.linspace(-5, 5, 64)
    whole = ops.new_moments(x)
    ops.channel_moments_(x, *whole)
    for sizes in ([1024, 1024], [5, 300, 1743], [1] * 48 + [2000]):
        parts = ops.new_moments(x)
        for part in x.split(sizes):
            ops.channel_moments_(part, *parts)
        assert parts[0] == whole[0]
        deviation = (whole[2] / whole[0]).sqrt()
        assert ((parts[1] - whole[1]).abs() <= 1e-6 * (whole[1].abs() + deviation)).all()
        torch.testing.assert_close(parts[2], whole[2], rtol=1e-6, atol=0)


def test_same_bits_with_one_and_two_threads():
    threads = torch.get_num_threads()
    try:
        for op, case in CASES.items():
            sample = next(s for s in case.samples(torch.bfloat16) if "131" in s.name)
            written = []
            for n in (1, 2):
                torch.set_num_threads(n)
                written.append(results(case, getattr(torch.ops.ssah, op), sample))
            for a, b in zip(*written, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), op
    finally:
        torch.set_num_threads(threads)


def test_unmasked_nan_shows_and_masked_does_not():
    x = torch.randn(6, 3)
    x[2, 1] = float("nan")
    state = ops.new_moments(x)
    ops.channel_moments_(x, *state)
    assert state[2].isnan().tolist() == [False, True, False]
    mask = torch.ones(6, dtype=torch.bool)
    mask[2] = False
    state = ops.new_moments(x)
    ops.channel_moments_(x, *state, mask)
    assert state[0] == 5
    assert state[2].isfinite().all()


def test_addresses_past_two_to_the_31():
    rows, channels, stride = 3, 17, 2**30 + 3
    storage = torch.empty(rows * stride, dtype=torch.bfloat16)
    x = storage.as_strided((rows, channels), (stride, 1))
    x.copy_(torch.randn(rows, channels))
    state, expected = ops.new_moments(x), x.double()
    ops.channel_moments_(x, *state)
    torch.testing.assert_close(state[1], expected.mean(0))
    norms = ops.column_sq_norms(x)
    torch.testing.assert_close(norms, expected.square().sum(0))


def test_non_contiguous_mask_and_many_leading_dimensions():
    torch.manual_seed(5)
    x = torch.randn(2, 3, 4, 5, 6).transpose(0, 2)
    mask = (torch.rand(5, 2, 3, 4) < 0.5).permute(3, 2, 1, 0)
    state = ops.new_moments(x)
    ops.channel_moments_(x, *state, mask)
    torch.testing.assert_close(state[1], x[mask].double().mean(0))


X, F64 = torch.randn(4, 6), torch.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.channel_moments_(X.int(), *ops.new_moments(X)), TypeError, "x has dtype"),
        (
            lambda: ops.channel_moments_(X, *moments_state(5, torch.Generator(), True)),
            ValueError,
            r"mean has shape \(5,\); it must be \(6,\)",
        ),
        (
            lambda: ops.channel_moments_(X, *(s.float() for s in ops.new_moments(X))),
            TypeError,
            "count has dtype",
        ),
        (
            lambda: ops.channel_moments_(X, *ops.new_moments(X), torch.ones(3, dtype=torch.bool)),
            ValueError,
            "token_mask has shape",
        ),
        (
            lambda: ops.channel_moments_(X, *ops.new_moments(X), torch.ones(4)),
            TypeError,
            "token_mask has dtype",
        ),
        (lambda: ops.gated_moments(X, X[:2], *ops.new_moments(X)), ValueError, "up has shape"),
        (
            lambda: ops.gated_moments(X, X, *ops.new_moments(X), act="tanh"),
            ValueError,
            "act is 'tanh'",
        ),
        (
            lambda: ops.taylor_moments_(X, X.half(), X[0].double(), X[0].double()),
            ValueError,
            "grad has dtype",
        ),
        (lambda: ops.column_sq_norms(X[0]), ValueError, "weight has 1 dimensions"),
        (
            lambda: ops.channel_moments_(torch.tensor(1.0), *ops.new_moments(X)),
            ValueError,
            "x has 0",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_backend_names_are_checked():
    with pytest.raises(ValueError, match="backend is 'cpp'"), ssah_kernels.use("cpp"):
        raise AssertionError("not reached")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_missing_extension_says_how_to_get_it(name, monkeypatch, tmp_path):
    module = importlib.import_module(f"ssah_kernels.backends.{name}")
    if name == "cpu":
        monkeypatch.setattr(module, "LIBRARY", tmp_path / "none.so")
        monkeypatch.setattr(module, "missing", module.missing.__wrapped__)
    else:
        monkeypatch.setattr(module, "built", lambda: None)
        monkeypatch.setattr(module, "_library", module._library.__wrapped__)
    with pytest.raises(backends.MissingBackendError, match="pip install --no-build-isolation"):
        backends.kernel(name, "channel_moments_")
