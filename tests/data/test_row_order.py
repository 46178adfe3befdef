"""The order of rows: every row once an epoch, a share of others, pools in turns; and unpadding."""

from __future__ import annotations

import pytest
from tiny_models import IGNORED, collate, rows

from ssah.data import Encoded, encoded_rows, in_turns, mixed, schedule


def rows_of(length: int, n: int) -> list[Encoded]:
    return [{"input_ids": [i] * (length + i), "labels": [i] * (length + i)} for i in range(n)]


def test_a_schedule_has_every_row_once_in_an_epoch() -> None:
    rows = rows_of(1, 12)
    order = schedule([rows], 4, 6, seed=0)
    assert sorted(row["input_ids"][0] for row in order) == sorted([*range(12), *range(12)])
    assert schedule([rows], 4, 6, seed=0) == order != schedule([rows], 4, 6, seed=1)
    for start in range(0, 24, 4):  # rows of a batch are of similar length
        lengths = [len(row["input_ids"]) for row in order[start : start + 4]]
        assert max(lengths) - min(lengths) <= 3
    assert schedule([rows], 4, 20, seed=0)[:24] == order  # arms that train longer see the same


def test_a_batch_has_as_many_rows_of_each_pool() -> None:
    first, second = rows_of(1, 5), rows_of(100, 9)
    order = schedule([first, second], 4, 20, seed=0)
    for start in range(0, 80, 4):
        lengths = [len(row["input_ids"]) for row in order[start : start + 4]]
        assert [length >= 100 for length in lengths] == [False, False, True, True]
    with pytest.raises(ValueError, match="multiple of 2"):
        schedule([first, second], 3, 1, 0)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.45])
def test_a_share_of_others_is_spread_over_the_batches_of_the_rows(share: float) -> None:
    first, second = rows_of(1, 9), rows_of(100, 5)
    plain = schedule([first], 4, 30, seed=2)
    order = mixed(first, second, share, 4, 30, seed=2)
    others = [i for i, row in enumerate(order) if row in second]
    assert [row for i, row in enumerate(order) if i not in others] == [
        row for i, row in enumerate(plain) if i not in others
    ]
    for done in range(31):
        count = sum(i < 4 * done for i in others)
        assert share * 4 * done - 1e-9 <= count < share * 4 * done + 1 - 1e-9
    # Epoch by epoch, each of the others once; and in more than one place of a batch.
    assert sorted(order[i]["input_ids"][0] for i in others[:5]) == list(range(5))
    assert len({i % 4 for i in others}) > 1
    assert mixed(first, second, share, 4, 20, seed=2) == order[:80]
    assert mixed(first, second, share, 4, 30, seed=3) != order


def test_the_shortest_run_has_one_other() -> None:
    first, second = rows_of(1, 9), rows_of(100, 5)
    order = mixed(first, second, 0.001, 4, 3, seed=0)
    assert [row in second for row in order].count(True) == 1
    # 0.07 * 100 is above 7 in binary, and eight rows of a hundred would be too many.
    order = mixed(first, second, 0.07, 100, 1, seed=0)
    assert [row in second for row in order].count(True) == 7


def test_pools_take_turns() -> None:
    first, second = rows_of(1, 6), rows_of(100, 9)
    order = in_turns((first, second), (1, 2), 3, 8, seed=1)
    batches = [order[start : start + 3] for start in range(0, 24, 3)]
    turns = [[row in first for row in batch] for batch in batches]
    assert turns == [[i % 3 == 0] * 3 for i in range(8)]
    of_first = [row for i in (0, 3, 6) for row in batches[i]]
    of_second = [row for i in (1, 2, 4, 5, 7) for row in batches[i]]
    assert of_first == schedule([first], 3, 3, seed=1)
    assert of_second == schedule([second], 3, 5, seed=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_batches_have_no_padding(side: str) -> None:
    data = rows((5, 9, 4), seed=3)
    batches = [collate(data[:2], side=side), collate(data[2:], side=side)]
    assert encoded_rows(batches) == [
        {"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in data
    ]
    whole = {key: value for key, value in batches[1].items() if key != "attention_mask"}
    assert encoded_rows([whole])[0]["labels"].count(IGNORED) == 2
    with pytest.raises(ValueError, match="batches have input_ids, attention_mask; they must have"):
        encoded_rows([collate(data, labels=False)])
    with pytest.raises(ValueError, match="batches have no row"):
        encoded_rows([])
