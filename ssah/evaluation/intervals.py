"""Confidence intervals: of a rate and of a mean of rates (Wilson), of a mean and of a paired
difference (bootstrap).

Of 10 requests, 8 are refused: 0.80, with a 95 % interval from 0.49 to 0.94. Of 1000, 800: 0.77 to
0.82. None of 10: from 0 to 0.28, because ten requests cannot say that nothing ever happens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

from torch import Tensor

Unit = Literal["points", "nats", "cosine"]

_CHUNK = 4_000_000  # values drawn at a time


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate:

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),   p = successes / n

    z is the standard normal quantile of (1 + level) / 2. It stays inside [0, 1] and has a width
    even where all trials agree.

    Source: E. B. Wilson, J. Amer. Statist. Assoc. 22 (1927), 209-212.

    Args:
        successes, n: counts, 0 <= successes <= n and n >= 1.
        level: of confidence, a fraction in (0, 1).

    Returns:
        The lower and the upper bound, fractions in [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    if n < 1:
        raise ValueError(f"n is {n}, must be at least 1")
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}, must be between 0 and n = {n}")
    check_level(level)
    from scipy import stats  # imported when it is needed: it takes most of a second

    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def macro_interval(
    successes: Sequence[int], sizes: Sequence[int], level: float = 0.95
) -> tuple[float, float]:
    """Interval of the macro mean: the mean of the rates of K strata, each of which counts alike.

    Wilson's interval of its value m, for as many trials as would have the variance v of m:

        m = 1/K sum_k p_k        v = max(v_own, v_alike)        trials = m (1 - m) / v
        v_own   = 1/K^2 sum_k p_k (1 - p_k) / (n_k - 1)         n_k = 1: m (1 - m) in that place
        v_alike = 1/K^2 sum_k m (1 - m) / n_k                   if all strata had the rate m

    v_own is the unbiased estimate. It is 0 where every stratum agrees with itself, which strata of
    few rows often do, and v_alike is what keeps the interval honest there. Strata of one size give
    Wilson's interval of the pooled rate, or a wider one. A bootstrap within the strata is too
    narrow: its variance has (n_k - 1) / n_k of the spread. Simulated for 66 strata of 5, it covers
    the truth in 90 % of cases where 95 % were asked for, and this in 96 to 99 %.

    Two strata, 1 of 2 and 0 of 8: m = 0.25, v_own = 1/4 (0.25 / 1 + 0) = 0.0625, v_alike = 1/4
    0.1875 (1/2 + 1/8) = 0.029, so that 3 trials are left of 10: from 0.04 to 0.74.

    Source: Wilson for an effective number of trials, C. Franco, R. Little, T. Louis, E. Slud,
    J. Survey Statistics and Methodology 7 (2019), 334-364; the maximum is ours.

    Args:
        successes, sizes: of each stratum, 0 <= successes <= size and size >= 1.
        level: of confidence, a fraction in (0, 1).

    Returns:
        The lower and the upper bound, fractions in [0, 1].

    Raises:
        ValueError: an argument is out of range, or there is no stratum.
    """
    if not sizes or len(successes) != len(sizes):
        raise ValueError(
            f"successes has {len(successes)} and sizes {len(sizes)} strata, must have as many, and "
            "at least one"
        )
    if not all(0 <= s <= n and n >= 1 for s, n in zip(successes, sizes, strict=True)):
        raise ValueError("successes must be between 0 and the size of the stratum, at least 1")
    check_level(level)
    rates = [s / n for s, n in zip(successes, sizes, strict=True)]
    m = sum(rates) / len(rates)
    alike = sum(1 / n for n in sizes) / len(sizes) ** 2  # v_alike / (m (1 - m))
    spread = m * (1 - m)
    own = [p * (1 - p) / (n - 1) if n > 1 else spread for p, n in zip(rates, sizes, strict=True)]
    # Of 0 and of 1 the variance is 0 in either form; the trials of v_alike are the limit.
    trials = 1 / alike if spread == 0 else min(1 / alike, spread * len(sizes) ** 2 / sum(own))
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = m + z * z / (2 * trials)
    reach = z * math.sqrt(spread / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def bootstrap(
    values: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampled along the first dimension.

    With ``[requests, seeds]`` a request is drawn with all its seeds: values of one request are not
    independent, and the interval speaks about other requests with these same seeds.

    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        values: ``[requests]`` or ``[requests, seeds]``, numbers or bools, finite.
        level: of confidence, a fraction in (0, 1).
        resamples: how many times the requests are drawn, at least 2.
        seed: of the drawing; the same arguments give the same interval.

    Returns:
        The lower and the upper bound, in the unit of ``values``. Both equal the mean where all
        requests agree: for a single rate, :func:`wilson` says more.

    Raises:
        TypeError: ``values`` is not a tensor.
        ValueError: it is empty, has another number of dimensions, or a value that is not finite; or
            another argument is out of range.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values is a {type(values).__name__}, must be a tensor")
    if values.dim() not in (1, 2) or values.numel() == 0:
        raise ValueError(
            f"values has shape {tuple(values.shape)}, must be [requests] or [requests, seeds] "
            "with at least one of each"
        )
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}, must be at least 2")
    check_level(level)
    values = values.detach().cpu().double()
    if not bool(values.isfinite().all()):
        raise ValueError("values has NaN or infinite entries, must be finite")
    per_request = values if values.dim() == 1 else values.mean(1)  # [requests]
    n = len(per_request)
    if n == 1:  # every resample is that one request; scipy asks for two
        return float(per_request), float(per_request)
    from scipy import stats

    interval = stats.bootstrap(
        (per_request.numpy(),),
        lambda drawn, axis: drawn.mean(axis),  # [resamples, requests] -> [resamples]
        n_resamples=resamples,
        batch=max(1, _CHUNK // n),
        confidence_level=level,
        method="percentile",
        rng=seed % 2**64,  # torch takes a negative seed, numpy does not
    ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_difference(
    first: Tensor, second: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean of ``first - second`` and its interval, paired over requests (and seeds).

    Two arms that were judged on the same requests differ less by chance than two samples of
    requests do; the bootstrap of the differences uses that.

    Args:
        first, second: of the same shape, ``[requests]`` or ``[requests, seeds]``.
        level, resamples, seed: as :func:`bootstrap` takes them.

    Returns:
        The mean difference, and the bounds of its interval.

    Raises:
        ValueError: the shapes differ, or as :func:`bootstrap` says.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"first has shape {tuple(first.shape)} and second {tuple(second.shape)}, must be "
            "equal: the same requests, in the same order, with the same seeds"
        )
    difference = first.double() - second.double()
    interval = bootstrap(difference, level=level, resamples=resamples, seed=seed)
    return float(difference.mean()), interval


def difference(
    first: Tensor, second: Tensor, unit: Unit, *, level: float = 0.95, seed: int = 0
) -> tuple[float, list[float]]:
    """Mean of ``first - second`` and its interval: the bootstrap, paired, by request.

    Where every request has the same difference d, all resamples agree and the bootstrap has no
    width, although other requests might differ. Of rates the interval is then that of how many do:
    none of n, so at most u of all, Wilson's upper bound; each moves the mean by at most 1 + |d|:

        d -+ u (1 + |d|), inside [-1, 1]

    Args:
        first, second: ``[requests]`` or ``[requests, seeds]``.
        unit: ``"points"`` where values are rates in [0, 1], ``"nats"`` where they are losses,
            ``"cosine"`` where they are cosine distances.
        level: of confidence, a fraction in (0, 1).
        seed: of the bootstrap.
    """
    value, (low, high) = paired_difference(first, second, level=level, seed=seed)
    # Losses are never equal by chance: only rates can agree on every request and mean little by it.
    if unit == "points" and low == high:
        reach = wilson(0, len(first), level)[1] * (1 + abs(value))
        low, high = max(-1.0, value - reach), min(1.0, value + reach)
    return value, [low, high]


def check_level(level: float) -> None:
    """Refuse, with ValueError, a level of confidence that is not a fraction in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, must be above 0 and below 1")
