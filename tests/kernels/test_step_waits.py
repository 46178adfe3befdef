"""A step of an optimiser, and an operator, wait for no GPU once they have run.

The GPU is pretended (tests/helpers/pretend_gpu.py): it counts, and computes what the CPU does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretend_gpu import PretendGPU
from torch import Tensor

from ssah_kernels import bit_masks, ops
from ssah_kernels.optim import MaskedAdamW, MaskedSGD

COUNTED: dict[str, Callable[[Tensor], Any]] = {
    "a value is read": lambda x: float(x.sum()),
    "a copy from the GPU": lambda x: x.cpu(),
    "a copy to the GPU": lambda x: x.copy_(torch.ones(4)),
    "a boolean index": lambda x: x[x > 1],
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 1),
    "bincount": lambda x: x.long().bincount(),
    "an index [2] of the host": lambda x: x[torch.tensor([0, 2])],
}


@pytest.mark.parametrize("what", COUNTED)
def test_the_pretended_gpu_counts_a_wait_and_says_where(what: str) -> None:
    with PretendGPU() as gpu:
        x = torch.arange(4.0, device="cuda:0")
        assert gpu.waits == []
        COUNTED[what](x)
    assert [w.what.startswith(what) for w in gpu.waits] == [True], gpu.said()
    assert gpu.waits[0].where.startswith("tests/kernels/test_step_waits.py:")


def test_a_copy_from_pinned_memory_is_queued_and_no_wait() -> None:
    with PretendGPU() as gpu:
        host = torch.ones(3).pin_memory()
        there = host.to("cuda:0", non_blocking=True)
        assert gpu.waits == []
        host.to("cuda:0")
        torch.ones(3).to("cuda:0", non_blocking=True)
        assert len(gpu.waits) == 2
        assert there.device.type == "cuda"
        assert torch.equal((there + 1).cpu(), torch.full((3,), 2.0))


def _parameters(device: str, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (8, 16), (8, 16), (16,), (2, 3, 4)
    return [torch.randn(shape, generator=g).to(dtype).to(device) for shape in shapes]


def _steps(
    kind: type[MaskedAdamW | MaskedSGD],
    options: dict[str, Any],
    device: str,
    scales: bool = False,
) -> Iterator[list[Tensor]]:
    """The parameters after each of three steps; ``scales``: with what a ``GradScaler`` sets."""
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    params = [torch.nn.Parameter(x) for x in _parameters(device, dtype)]
    indices = [torch.tensor([0, 3, 7]), None, torch.tensor([1, 2]), None]
    dims = [0, -1, 0, 0]
    optimizer = kind([{"params": params, "indices": indices, "dims": dims}], **options)
    for step in range(3):
        if "lr" not in options:
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)  # as a schedule does
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.1 * (i + 1) * (step + 1))
        if scales:
            optimizer.grad_scale = torch.full((), 4.0, device=device)
            optimizer.found_inf = torch.full((), float(step == 1), device=device)
        optimizer.step()
        yield params


STEPS: dict[str, tuple[type[MaskedAdamW | MaskedSGD], dict[str, Any]]] = {
    "adamw": (MaskedAdamW, {}),
    "adamw, clipped": (MaskedAdamW, {"max_norm": 0.5, "track_importance": True}),
    "adamw, bfloat16": (MaskedAdamW, {"rounding": "stochastic", "state_dtype": torch.bfloat16}),
    "adamw, lr on the host": (MaskedAdamW, {"lr": torch.tensor(0.1)}),
    "sgd": (MaskedSGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_a_gpu(name: str, scales: bool) -> None:
    """Not the first one either; and what it gives is, bit for bit, what the CPU gives."""
    kind, options = STEPS[name]
    *_, expected = _steps(kind, options, "cpu", scales)
    with PretendGPU() as gpu:
        *_, found = _steps(kind, options, "cuda:0", scales)
        # As it is made, it copies its indices and reads them; and the test copies parameters.
        made = "ssah_kernels/optim/options.py", "ssah_kernels/indices.py", "tests/"
        assert not [w for w in gpu.waits if not w.where.startswith(made)], gpu.said()
        for there, must in zip(found, expected, strict=True):
            assert there.device.type == "cuda"
            assert torch.equal(there.cpu(), must)


def test_an_update_of_single_elements_waits_in_its_first_call_alone() -> None:
    def run(device: str) -> Iterator[Tensor]:
        weight = torch.arange(32.0, device=device).view(4, 8)
        bits = bit_masks.pack_bits(torch.arange(32, device=device) % 3 == 0)
        state = [torch.zeros(11, device=device) for _ in range(2)]
        lists = ([x] for x in (weight, weight + 1, *state, bits, bit_masks.block_offsets(bits)))
        arguments = tuple(lists)
        for step in (1.0, 2.0, 3.0):
            ops.bit_masked_adamw_(*arguments, torch.tensor(0.1), torch.tensor(step))
            yield weight

    *_, expected = run("cpu")
    with PretendGPU() as gpu:
        steps = run("cuda:0")
        next(steps)  # compares the mask with its offsets
        gpu.waits.clear()
        *_, found = steps
        assert not gpu.waits, gpu.said()
        assert torch.equal(found.cpu(), expected)


def test_a_table_of_tritons_kernels_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from ssah_kernels.backends.triton.masked_list import device_table

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with PretendGPU() as gpu:
        table = device_table([3, 5], gpu.device)
        assert not gpu.waits
        assert table.device == gpu.device
        assert table.tolist() == [3, 5]


def test_a_norm_waits_for_nothing_once_its_index_was_read() -> None:
    with PretendGPU() as gpu:
        grads = [torch.full((4, 6), 2.0, device="cuda:0"), torch.ones(5, device="cuda:0")]
        index = torch.arange(2, device="cuda:0")
        for _ in range(2):
            gpu.waits.clear()
            norm = ops.masked_grad_norm(grads, [index, None], [0, 0], torch.tensor(2.0))
        assert not gpu.waits, gpu.said()
        assert float(norm) == pytest.approx(53**0.5 / 2)
