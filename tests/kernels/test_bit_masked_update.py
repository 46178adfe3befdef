"""The update of single elements: against loops, against the update of vectors, and what it refuses.

`tests/cases.py` compares it with the reference in every backend.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssah_kernels import ops, use
from ssah_kernels.bit_masks import block_offsets, pack_bits

BACKENDS = ("reference", "cpu")
LR, STEP = torch.tensor(0.01), torch.tensor(1.0)


def call(weight: Tensor, mask: Tensor, **changed: Any) -> dict[str, Any]:
    """The arguments of one call with zero state; gradients are of a generator."""
    bits = pack_bits(mask)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(weight.shape, generator=g, dtype=torch.float64).to(weight.dtype)
    state = torch.float64 if weight.dtype == torch.float64 else torch.float32
    first, second = (torch.zeros(int(mask.sum()), dtype=state) for _ in range(2))
    lists = {"params": [weight], "grads": [grad], "exp_avgs": [first], "exp_avg_sqs": [second]}
    scalars = {"lr": LR, "step": STEP}
    return {**lists, "masks": [bits], "offsets": [block_offsets(bits)], **scalars, **changed}


def drawn(shape: tuple[int, ...], share: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 5000), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_offsets_count_what_is_before_each_block(n: int, share: float, seed: int) -> None:
    mask = drawn((n,), share, seed)
    counted = [int(mask[: 1024 * block].sum()) for block in range(-(-n // 1024) + 1)]
    assert block_offsets(pack_bits(mask)).tolist() == counted


def test_the_offsets_of_the_example() -> None:
    offsets = block_offsets(pack_bits(torch.arange(3000) % 3 == 0))
    assert offsets.tolist() == [0, 342, 683, 1000]
    assert block_offsets(pack_bits(torch.ones(6_000_000, dtype=torch.bool)))[-1] == 6_000_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_fifty_steps_against_loops(backend: str) -> None:
    """Decay, and momentum that was there before; what does not train keeps the bits of a NaN."""
    mask = drawn((30, 50), 0.5)
    weight = torch.randn(30, 50)
    weight[~mask] = torch.where(torch.rand(int((~mask).sum())) < 0.1, torch.nan, weight[~mask])
    before = weight.clone().view(torch.int32)
    places = mask.flatten().nonzero()[:, 0].tolist()
    m, v = [0.3] * len(places), [0.01] * len(places)
    w = [float(weight.view(-1)[i]) for i in places]
    args = call(weight, mask)
    args["exp_avgs"][0].fill_(0.3)
    args["exp_avg_sqs"][0].fill_(0.01)
    with use(backend):
        for t in range(1, 51):
            args["grads"][0].normal_(generator=torch.Generator().manual_seed(t))
            ops.bit_masked_adamw_(**{**args, "step": torch.tensor(float(t))}, weight_decay=0.1)
            grads = args["grads"][0].view(-1).tolist()
            for k, i in enumerate(places):
                m[k] = 0.9 * m[k] + 0.1 * grads[i]
                v[k] = 0.999 * v[k] + 0.001 * grads[i] ** 2
                size = (v[k] / (1 - 0.999**t)) ** 0.5 + 1e-8
                w[k] = w[k] * (1 - 0.01 * 0.1) - 0.01 * m[k] / (1 - 0.9**t) / size
    torch.testing.assert_close(
        weight[mask].double(), torch.tensor(w).double(), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(weight.view(torch.int32)[~mask], before[~mask])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [None, 7])
def test_the_bits_are_those_of_the_update_of_vectors(dtype: torch.dtype, seed: int | None) -> None:
    mask = drawn((70, 90), 0.4)
    weight = torch.randn(70, 90).to(dtype)
    noise = None if seed is None else torch.tensor(seed)
    args = call(weight.clone(), mask, seed=noise)
    vector, grad = weight[mask], args["grads"][0][mask]
    states = [torch.zeros_like(args["exp_avgs"][0]) for _ in range(2)]
    ops.bit_masked_adamw_(**args)
    lists = [vector], [grad], [states[0]], [states[1]], [None], [0]
    ops.masked_adamw_(*lists, LR, STEP, seed=noise)
    assert torch.equal(args["params"][0][mask], vector)
    assert torch.equal(args["exp_avgs"][0], states[0])
    assert torch.equal(args["exp_avg_sqs"][0], states[1])
    assert not torch.equal(vector, weight[mask])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    mask, weight, results = drawn((700, 300), 0.3), torch.randn(700, 300), []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        args = call(weight.clone(), mask)
        ops.bit_masked_adamw_(**args)
        results.append([args[name][0] for name in ("params", "exp_avgs", "exp_avg_sqs")])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_mask_that_changed_is_read_again() -> None:
    weight, mask = torch.ones(40), torch.arange(40) < 10
    args = call(weight, mask)
    ops.bit_masked_adamw_(**args)
    args["masks"][0].copy_(pack_bits(torch.arange(40) < 11))
    with pytest.raises(ValueError, match=r"offsets\[0\] does not belong to masks\[0\]"):
        ops.bit_masked_adamw_(**args)


def test_a_mask_of_other_data_is_read_again() -> None:
    """What is assigned to ``data`` has the version of what was there."""
    args = call(torch.ones(40), torch.arange(40) < 10)
    ops.bit_masked_adamw_(**args)
    args["masks"][0].data = pack_bits(torch.arange(40) < 11)
    with pytest.raises(ValueError, match=r"offsets\[0\] does not belong to masks\[0\]"):
        ops.bit_masked_adamw_(**args)


ONE = torch.arange(40) < 10
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "offsets of another mask": (
        {"offsets": [torch.tensor([0, 9])]},
        r"offsets\[0\] does not belong to masks\[0\]",
    ),
    "more state than bits": (
        {"exp_avgs": [torch.zeros(11)], "exp_avg_sqs": [torch.zeros(11)]},
        "have 11 elements; they must have 10",
    ),
    "states of two lengths": ({"exp_avg_sqs": [torch.zeros(11)]}, r"exp_avg_sqs\[0\] has shape"),
    "bits of another parameter": (
        {"masks": [torch.zeros(6, dtype=torch.uint8)]},
        r"masks\[0\] has shape \(6,\); it must be \(5,\)",
    ),
    "a mask of bool": ({"masks": [ONE]}, r"masks\[0\] has dtype torch.bool; it must be uint8"),
    "columns": ({"params": [torch.ones(40, 2)[:, 0]]}, r"params\[0\] must be contiguous"),
    "state in 8 bits": (
        {"exp_avgs": [torch.zeros(10, dtype=torch.uint8)]},
        r"exp_avgs\[0\] has dtype torch.uint8; it must be float32 or bfloat16",
    ),
    "a gradient of another shape": ({"grads": [torch.ones(39)]}, r"grads\[0\] has shape"),
    "no parameter": ({"params": []}, "params is empty"),
    "one list shorter": ({"masks": []}, "masks has 0 entries; it must have 1"),
}


@pytest.mark.parametrize("which", WRONG)
def test_what_does_not_fit_is_refused(which: str) -> None:
    changed, message = WRONG[which]
    args = {**call(torch.ones(40), ONE), **changed}
    before = [p.clone() for p in args["params"]]
    with pytest.raises((TypeError, ValueError), match=message):
        ops.bit_masked_adamw_(**args)
    assert all(torch.equal(p, b) for p, b in zip(args["params"], before, strict=True))


def test_bits_after_the_last_element_are_refused() -> None:
    args = call(torch.ones(13), torch.arange(13) < 3)
    args["masks"][0][1] |= 1 << 6  # bit 14
    args["offsets"] = [block_offsets(args["masks"][0])]
    with pytest.raises(ValueError, match="bits after the last of 13 elements"):
        ops.bit_masked_adamw_(**args)


def test_a_mask_that_fitted_a_longer_parameter_is_looked_at_again() -> None:
    args = call(torch.ones(13), torch.arange(13) > 9)
    ops.bit_masked_adamw_(**args)
    args |= {"params": [torch.ones(10)], "grads": [torch.ones(10)]}
    with pytest.raises(ValueError, match="bits after the last of 10 elements"):
        ops.bit_masked_adamw_(**args)
