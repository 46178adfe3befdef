"""The examples with numbers that stand at the heads of the files of ``ssah_kernels``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssah_kernels import ops, overlap
from ssah_kernels.backends import fatbin

ONE = torch.tensor(1.0)


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_channel_moments() -> None:
    x = floats(0, 2, 4)[:, None]  # [tokens, channels]
    state = ops.new_moments(x)
    ops.channel_moments_(x[:2], *state)
    assert [float(s) for s in state] == [2, 1, 2]
    ops.channel_moments_(x[2:], *state)
    assert [float(s) for s in state] == [3, 2, 8]


def test_gated_moments() -> None:
    gate, up = (floats(value).requires_grad_() for value in (1, 2))
    h = ops.gated_moments(gate, up, *ops.new_moments(gate))
    h.backward(floats(1))
    found = [h.item(), gate.grad.item(), up.grad.item()]
    assert found == pytest.approx([1.4621, 1.8553, 0.7311], abs=5e-5)


def test_gated_product() -> None:
    gate, up, factors = (
        torch.tensor(rows, dtype=torch.float32)
        for rows in ([[1, 2], [1, -2]], [[3, 4], [3, 4]], [[1, 1], [0, 1]])
    )
    h = ops.gated_product(gate, up, factors, torch.tensor([0, 1]), act="relu")
    assert h.tolist() == [[3, 8], [0, 0]]


def test_taylor_moments() -> None:
    signed, squared = torch.zeros(2, 1, dtype=torch.float64)
    ops.taylor_moments_(floats(1, -2)[:, None], floats(3, 1)[:, None], signed, squared)
    assert (signed.item(), squared.item()) == (1, 13)


def test_norms() -> None:
    assert ops.column_sq_norms(torch.tensor([[1.0, 2], [3, 0]])).tolist() == [10, 4]
    grads, first = [torch.tensor([[3.0, 4], [9, 9]])], [torch.tensor([0])]
    assert ops.masked_grad_norm(grads, first, [0]) == 5
    assert ops.masked_grad_norm(grads, first, [0], 2 * ONE) == 2.5


def test_adamw() -> None:
    w, m, v = floats(1), floats(0), floats(0)
    ops.masked_adamw_([w], [floats(0.5)], [m], [v], [None], [0], 0.1 * ONE, ONE)
    assert [w.item(), m.item(), v.item()] == pytest.approx([0.899, 0.05, 0.00025], rel=1e-6)


@pytest.mark.parametrize(("nesterov", "after"), [(False, 0.905), (True, 0.8645)])
def test_sgd(nesterov: bool, after: float) -> None:
    w, b = floats(1), floats(0.5)
    ops.masked_sgd_(
        [w], [floats(0.5)], [b], [None], [0], 0.1 * ONE, 2 * ONE, momentum=0.9, nesterov=nesterov
    )
    assert [w.item(), b.item()] == pytest.approx([after, 0.95], rel=1e-6)


def test_the_other_half_of_a_weight() -> None:
    """A weight of 1 that grows by 0.001 a step moves in the fourth."""
    p, c = floats(1).bfloat16(), torch.zeros(1, dtype=torch.int16)
    seen = []
    for step in range(4):
        ops.masked_sgd_(
            [p], [floats(-1).bfloat16()], None, [None], [0], 0.001 * ONE, (step + 1) * ONE,
            compensations=[c],
        )  # fmt: skip
        seen.append((p.item(), c.item()))
    assert [weight for weight, _ in seen] == [1, 1, 1, 1.0078125]
    # 1.004 is 0x3f808312, but for four roundings, and 1.0078 is 0x3f81.
    assert abs(seen[-1][1] - (0x8312 - 0x10000)) <= 4


def test_columns_beside_each_other_share_no_element() -> None:
    matrix = torch.zeros(4, 6)
    assert not overlap.between(matrix[:, :3], matrix[:, 3:])
    assert overlap.between(matrix[:, :4], matrix[:, 3:])


@pytest.mark.parametrize(
    ("capability", "served_by"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "ptx_90"), ((7, 0), None)],
)
def test_which_gpu_a_library_serves(capability: tuple[int, int], served_by: str | None) -> None:
    for built in ("sm_80", "sm_90"):
        assert fatbin.serves([built], capability) == (built == served_by)
    assert fatbin.serves(["sm_80", "sm_90", "ptx_90"], capability) == (served_by is not None)
