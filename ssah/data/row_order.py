"""In which order rows are trained on, and which of them stand for all.

For example, two pools of 6 and 9 rows in batches of 4: a batch has 2 rows of each pool. One pass
over the first pool is 3 batches; the second one then has 3 rows left, and goes on with these.

Of a pool alone, some rows may be others. A share of 0.1 in batches of 4 is 0.4 rows a batch, so
that batches 0, 2, 5 and 7 have one of them. Or whole batches take turns: of turns of 1 and 3
updates, batches 0, 4 and 8 are of the first pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from ssah.data.encoding import Encoded

_WINDOW = 16  # batches among which rows of similar length are put together


def schedule(
    pools: Sequence[Sequence[Encoded]], batch_size: int, steps: int, seed: int
) -> list[Encoded]:
    """Rows in the order of training, batch after batch; fewer ``steps`` give the first of them.

    Each pool is shuffled anew in every epoch of its own. A batch has as many rows of each pool, of
    similar length: rows are sorted within a window of at most 16 batches and an epoch, and the
    batches of a window are shuffled.

    Args:
        pools: encoded rows; none is empty.
        batch_size: rows of a batch, a multiple of the number of pools.
        steps: batches.
        seed: of the order.

    Raises:
        ValueError: a pool is empty, or the batch cannot be shared among the pools.
    """
    if batch_size % len(pools):
        raise ValueError(f"batch_size is {batch_size}; it must be a multiple of {len(pools)}")
    size = batch_size // len(pools)  # rows of each pool in a batch
    width = max(1, min(_WINDOW, *(len(pool) // size for pool in pools)))
    starts = range(0, steps, width)
    # Whole windows, also where training stops inside one: more steps then go on with the same rows.
    whole = size * width * len(starts)
    streams = [_stream(pool, whole, f"{seed}/{i}") for i, pool in enumerate(pools)]
    rows: list[Encoded] = []
    for start in starts:
        windows = [
            sorted(
                stream[start * size : (start + width) * size],
                key=lambda row: len(row["input_ids"]),
            )
            for stream in streams
        ]
        order = list(range(width))
        # Without this every window would begin with its shortest rows.
        Random(f"{seed}/batches/{start}").shuffle(order)
        for k in order:
            rows += [row for window in windows for row in window[k * size : (k + 1) * size]]
    return rows[: batch_size * steps]


def mixed(
    rows: Sequence[Encoded],
    others: Sequence[Encoded],
    share: float,
    batch_size: int,
    steps: int,
    seed: int,
) -> list[Encoded]:
    """The batches that `schedule` makes of ``rows``, with a share of others in random places.

    What is left of ``rows`` stands where it would stand alone, so that two runs that mix other
    things in can be compared. At the end of each batch, ceil(share * n) of the n rows so far are
    others.

    Args:
        rows, others: encoded rows; others are shuffled anew in every epoch of their own.
        share: of others, in (0, 1).
        batch_size, steps, seed: as of `schedule`.

    Raises:
        ValueError: there is no row, or no other.
    """
    order = schedule([rows], batch_size, steps, seed)
    # Rounded up: in the shortest run there is one. Less a little: 0.07 * 100 is above 7 in binary.
    until = [math.ceil(share * batch_size * i - 1e-9) for i in range(steps + 1)]
    stream = iter(_stream(others, until[-1], f"{seed}/others"))
    for i in range(steps):
        count = until[i + 1] - until[i]
        # A batch is sorted by length: one place for all would drop rows of one length.
        for place in Random(f"{seed}/places/{i}").sample(range(batch_size), count):
            order[i * batch_size + place] = next(stream)
    return order


def in_turns(
    pools: tuple[Sequence[Encoded], Sequence[Encoded]],
    updates: tuple[int, int],
    batch_size: int,
    steps: int,
    seed: int,
) -> list[Encoded]:
    """Batches of the first pool, then of the second one, and again: each as `schedule` has them.

    Args:
        pools: encoded rows.
        updates: how many batches of each follow each other.
        batch_size, steps, seed: as of `schedule`.

    Raises:
        ValueError: a pool that has a turn is empty.
    """
    late = [step % sum(updates) >= updates[0] for step in range(steps)]  # of the second pool
    first, second = (
        iter(schedule([pool], batch_size, late.count(own), seed))
        for pool, own in zip(pools, (False, True), strict=True)
    )
    return [next(second if own else first) for own in late for _ in range(batch_size)]


def _stream(pool: Sequence[Encoded], n: int, seed: str) -> list[Encoded]:
    """``n`` rows, epoch after epoch."""
    if not pool:
        raise ValueError("there is no row to train on; there must be at least one")
    rows: list[Encoded] = []
    while len(rows) < n:
        # By the place, not by one generator: a longer stream begins with the same rows.
        epoch = list(pool)
        Random(f"{seed}/{len(rows)}").shuffle(epoch)
        rows += epoch
    return rows[:n]


def spread(rows: Sequence[Encoded], n: int) -> list[Encoded]:
    """``n`` of the rows (all, if there are fewer), evenly spaced: the same for every arm."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]
