"""Intervals against published values, exact enumeration and the normal approximation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssah.evaluation import bootstrap, macro_interval, paired_difference, wilson

# ------------------------------------------------------------------------------------------- wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_stays_inside_and_is_symmetric(case):
    successes, n = case
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    mirrored = wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_widens_with_the_level():
    widths = [high - low for low, high in (wilson(3, 10, level) for level in (0.5, 0.9, 0.99))]
    assert widths == sorted(widths)
    assert wilson(3, 10) == wilson(3, 10, 0.95)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "n is 0"),
        ((5, 4), "successes is 5, must be between 0 and n = 4"),
        ((-1, 4), "successes is -1"),
        ((1, 4, 1.0), "level is 1.0"),
        ((1, 4, 0.0), "level is 0.0"),
    ],
)
def test_wilson_refuses_what_is_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        wilson(*arguments)


# ---------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0, 5.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("level", [0.5, 0.8])
def test_bootstrap_is_that_of_all_resamples(values, level):
    n = len(values)
    means = sorted(sum(drawn) / n for drawn in product(values, repeat=n))
    exact = torch.tensor(means, dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(exact, tails).tolist()
    step = 1 / n  # between neighbouring means
    assert bootstrap(torch.tensor(values), level=level) == pytest.approx((low, high), abs=step)


def test_bootstrap_of_many_values_is_nearly_normal():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    low, high = bootstrap(values)
    error = float(values.std()) / 20
    mean = float(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)


def test_a_request_is_drawn_with_all_its_seeds():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    alike = values[:, None].expand(30, 5)
    assert bootstrap(alike) == pytest.approx(bootstrap(values))
    spread = alike + torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])  # the same for every request
    assert bootstrap(spread) == pytest.approx(bootstrap(values), abs=1e-6)


def test_bootstrap_is_repeatable_and_leaves_the_generator_alone():
    values = torch.rand(20)
    torch.manual_seed(5)
    np.random.seed(5)
    state, numpys = torch.random.get_rng_state(), np.random.get_state()[1]
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpys)
    assert bootstrap(values, seed=-1) == bootstrap(values, seed=-1) != bootstrap(values)


def test_bootstrap_in_chunks_is_the_same_and_takes_bools(monkeypatch):
    flags = torch.arange(50) % 3 == 0
    whole = bootstrap(flags)
    monkeypatch.setattr("ssah.evaluation.intervals._CHUNK", 50 * 700)
    assert bootstrap(flags) == whole == bootstrap(flags.double())


@pytest.mark.filterwarnings("error")
def test_requests_that_agree_have_an_interval_without_width():
    assert bootstrap(torch.ones(7)) == (1.0, 1.0)
    assert bootstrap(torch.tensor([0.25])) == (0.25, 0.25)
    assert bootstrap(torch.tensor([[1.0, 0.0]])) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "values is a list"),
        (torch.tensor(1.0), {}, ValueError, r"shape \(\)"),
        (torch.empty(0), {}, ValueError, "at least one of each"),
        (torch.empty(3, 0), {}, ValueError, "at least one of each"),
        (torch.ones(2, 2, 2), {}, ValueError, "must be"),
        (torch.tensor([1.0, float("nan")]), {}, ValueError, "NaN"),
        (torch.ones(2), {"resamples": 1}, ValueError, "resamples is 1"),
        (torch.ones(2), {"level": 95}, ValueError, "level is 95"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_resample(values, options, error, message):
    with pytest.raises(error, match=message):
        bootstrap(values, **options)


# ------------------------------------------------------------------------------------------ pairing


def test_pairing_takes_out_what_requests_have_in_common():
    generator = torch.Generator().manual_seed(0)
    hardness = torch.rand(60, 1, generator=generator)
    noise = 0.02 * torch.rand(60, 3, generator=generator)
    first, second = hardness + 0.1 + noise, hardness.expand(60, 3)
    mean, (low, high) = paired_difference(first, second)
    assert mean == pytest.approx(float((first - second).mean()))
    assert 0.1 < low < mean < high < 0.12
    alone = bootstrap(first)
    assert high - low < 0.1 * (alone[1] - alone[0])
    assert paired_difference(second, first)[0] == -mean


def test_pairing_takes_bools_and_refuses_other_shapes():
    mean, interval = paired_difference(torch.tensor([True, False]), torch.tensor([True, True]))
    assert mean == -0.5
    assert interval == (-1.0, 0.0)
    with pytest.raises(ValueError, match=r"shape \(2,\) and second \(3,\)"):
        paired_difference(torch.ones(2), torch.ones(3))


# -------------------------------------------------------------------------------------------- macro


def test_strata_alike_in_size_and_rate_have_wilsons_interval():
    for successes, n, strata in ((3, 10, 6), (0, 5, 66), (5, 5, 4)):
        expected = wilson(successes * strata, n * strata)
        # Each stratum has the same rate, so that nothing but its size and v_alike counts.
        n_alike = [n] * strata
        found = macro_interval([successes] * strata, n_alike)
        own = successes / n * (1 - successes / n) / (n - 1)
        alike = successes / n * (1 - successes / n) / n
        if own > alike:  # the unbiased variance is n / (n - 1) of it: a little wider
            assert found[0] < expected[0]
            assert found[1] > expected[1]
        else:
            assert found == pytest.approx(expected, abs=1e-12)


def test_the_worked_example_of_the_macro_mean():
    low, high = macro_interval([1, 0], [2, 8])
    n, m, z = 3, 0.25, 1.959963984540054
    middle, reach = m + z * z / 6, z * (m * (1 - m) / n + z * z / (4 * n * n)) ** 0.5
    assert (low, high) == pytest.approx(
        ((middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)), rel=1e-12
    )


@pytest.mark.parametrize("sizes", [[5] * 40, [1] * 40, [3, 5, 10, 20, 50]])
def test_the_macro_interval_covers_the_true_mean_as_often_as_it_says(sizes):
    rng = np.random.default_rng(0)
    rates = rng.beta(1, 4, len(sizes))
    inside = 0
    for _ in range(400):
        low, high = macro_interval(rng.binomial(sizes, rates).tolist(), sizes)
        inside += low <= rates.mean() <= high
    assert inside >= 372  # 95 % of 400 less two standard deviations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "at least one"),
        (([1], [2, 3]), "has 1 and sizes 2"),
        (([3], [2]), "between 0 and the size"),
        (([1], [2], 1.0), "level is 1.0"),
    ],
)
def test_the_macro_interval_refuses_what_is_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        macro_interval(*arguments)
