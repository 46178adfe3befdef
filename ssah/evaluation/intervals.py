"""Confidence intervals: of a rate (Wilson), of a mean and of a paired difference (bootstrap).

Of 10 requests, 8 are refused: 0.80, with a 95 % interval from 0.49 to 0.94. Of 1000, 800: 0.77 to
0.82. None of 10: from 0 to 0.28, because ten requests cannot say that nothing ever happens.
"""

from __future__ import annotations

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
