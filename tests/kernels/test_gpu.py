"""On a GPU: every case on both backends, streams, devices, graphs, optimisers, attribution."""

from __future__ import annotations

import on_device
import pytest
import torch
from cases import CASES, DTYPES, check_backend, copied
from on_device import moved

from ssah_kernels import backends
from ssah_kernels.optim import MaskedAdamW, MaskedSGD
from ssah_kernels.schema import KERNELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.xdist_group("gpu"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    why = backends.missing(request.param)
    if why is not None:
        pytest.skip(why)
    return request.param


@pytest.mark.parametrize("op", KERNELS)
def test_equals_reference(op: str, backend: str) -> None:
    reference = backends.kernel("reference", op)
    assert check_backend(CASES[op], moved(op, backend), reference) > 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", KERNELS)
def test_equals_reference_beyond_the_first_tile(op: str, dtype: torch.dtype, backend: str) -> None:
    reference = backends.kernel("reference", op)
    assert check_backend(CASES[op], moved(op, backend), reference, dtypes=(dtype,), which="far") > 1


@pytest.mark.parametrize("op", KERNELS)
def test_equals_reference_at_the_ends_of_the_range(op: str, backend: str) -> None:
    reference = backends.kernel("reference", op)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    options = {"dtypes": dtypes, "which": "extreme_of_float32"}
    assert check_backend(CASES[op], moved(op, backend), reference, **options) > 0


@pytest.mark.parametrize("op", KERNELS)
def test_opcheck(op: str, backend: str) -> None:
    sample = on_device.one_sample(op, torch.float32)
    args = tuple(copied(a, "cuda") for a in sample.args)
    with backends.use(backend):
        torch.library.opcheck(getattr(torch.ops.ssah, op).default, args, sample.kwargs)


@pytest.mark.parametrize("op", KERNELS)
def test_runs_on_the_current_stream(op: str, backend: str) -> None:
    on_device.check_side_stream(op, backend)


@pytest.mark.parametrize("op", KERNELS)
def test_a_graph_replays_it(op: str, backend: str) -> None:
    if not on_device.capturable(op):
        pytest.skip("it says that no CUDA graph can hold it")
    on_device.check_captured(op, backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("op", KERNELS)
def test_runs_on_the_device_of_its_tensors(op: str, backend: str) -> None:
    on_device.check_second_device(op, backend)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
@pytest.mark.parametrize("optimizer", [MaskedAdamW, MaskedSGD])
def test_optimiser_equals_the_cpu(optimizer: type, rounding: str, backend: str) -> None:
    on_device.check_optimizer(optimizer, rounding, backend)


@pytest.mark.parametrize("optimizer", [MaskedAdamW, MaskedSGD])
def test_a_step_waits_for_nothing(optimizer: type, backend: str) -> None:
    on_device.check_steps_wait_for_nothing(optimizer, backend)


@pytest.mark.parametrize("metric", ["variance", "norm"])
def test_a_batch_waits_for_nothing(metric: str, backend: str) -> None:
    on_device.check_batches_wait_for_nothing(metric, backend)


@pytest.mark.parametrize("metric", ["variance", "norm", "taylor", "fisher"])
def test_attribution_equals_the_cpu(metric: str, backend: str) -> None:
    on_device.check_attribution(metric, backend)
