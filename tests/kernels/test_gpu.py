"""On a GPU: every case on both backends, streams, devices, optimisers, attribution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, check_backend, copied, flat, results
from tiny_models import build
from torch import Tensor

import ssah
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


def moved(op: str, backend: str, device: str = "cuda") -> Callable[..., Any]:
    """The operator on a GPU, for arguments on the CPU, with their strides and their memory."""

    def call(*args: Any, **kwargs: Any) -> list[Tensor]:
        mine = [copied(a, device) for a in args]
        with backends.use(backend):
            returned = getattr(torch.ops.ssah, op)(*mine, **kwargs)
        for i in CASES[op].outputs:
            for theirs, own in zip(flat(args[i]), flat(mine[i]), strict=True):
                theirs.copy_(own)
        return [r.cpu() for r in flat(returned)]

    return call


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
    sample = next(s for s in CASES[op].samples(torch.float32) if "131" in s.name)
    args = tuple(copied(a, "cuda") for a in sample.args)
    with backends.use(backend):
        torch.library.opcheck(getattr(torch.ops.ssah, op).default, args, sample.kwargs)


@pytest.mark.parametrize("op", KERNELS)
def test_runs_on_the_current_stream(op: str, backend: str) -> None:
    """Inputs that another stream is still writing, behind a long wait, give the right result."""
    case = CASES[op]
    sample = next(s for s in case.samples(torch.float32) if "131" in s.name)
    expected = results(case, moved(op, backend), sample)
    ready = [copied(a, "cuda") for a in sample.args]
    args = [
        [x if x is None or isinstance(x, int) else torch.full_like(x, 0) for x in a]
        if isinstance(a, list)
        else torch.zeros_like(a)
        if isinstance(a, Tensor) and a.is_floating_point() and a.dim()
        else a
        for a in ready
    ]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), backends.use(backend):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        for late, value in zip(args, ready, strict=True):
            if late is not value:
                for to, source in zip(flat(late), flat(value), strict=True):
                    if isinstance(to, Tensor):
                        to.copy_(source)
        returned = getattr(torch.ops.ssah, op)(*args, **sample.kwargs)
        written = [*flat(returned), *(t for i in case.outputs for t in flat(args[i]))]
        written = [t.cpu() for t in written]
    for a, e in zip(written, expected, strict=True):
        assert torch.equal(a.nan_to_num(), e.nan_to_num())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("op", KERNELS)
def test_runs_on_the_device_of_its_tensors(op: str, backend: str) -> None:
    case = CASES[op]
    sample = next(s for s in case.samples(torch.bfloat16) if "131" in s.name)
    torch.cuda.set_device(0)
    first, second = (results(case, moved(op, backend, d), sample) for d in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
@pytest.mark.parametrize("optimizer", [MaskedAdamW, MaskedSGD])
def test_optimiser_equals_the_cpu(optimizer: type, rounding: str, backend: str) -> None:
    """Ten steps of compact and of indexed parameters, clipped, with importance."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=g).bfloat16() for s in ((40, 264), (5, 520), (77,))]
    grads = [[torch.randn(p.shape, generator=g).bfloat16() for p in start] for _ in range(10)]
    after = []
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
        index = torch.arange(0, 40, 3, device=device)
        groups = [{"params": params[:1], "indices": [index]}, {"params": params[1:]}]
        o = optimizer(groups, lr=1e-2, rounding=rounding, max_norm=1.0, track_importance=True)
        with backends.use(backend if device == "cuda" else "cpu"):
            for step in grads:
                for p, grad in zip(params, step, strict=True):
                    p.grad = grad.to(device)
                o.step()
        after.append([p.detach().cpu() for p in params])
    frozen = torch.ones(40, dtype=torch.bool)
    frozen[::3] = False
    assert torch.equal(after[1][0][frozen], start[0][frozen])
    for a, b in zip(*after, strict=True):
        # One rounding of a step that fell to the other neighbour moves what follows by a unit.
        unequal = (a.view(torch.int16) != b.view(torch.int16)).double().mean()
        assert unequal <= 0.02
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)


@pytest.mark.parametrize("metric", ["variance", "norm", "taylor", "fisher"])
def test_attribution_equals_the_cpu(metric: str, backend: str) -> None:
    model = build("llama").eval()
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (6, 11), generator=g)
    mask = torch.ones_like(ids)
    mask[1::2, 7:] = 0
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}]
    expected = ssah.attribute(copy.deepcopy(model), rows, metric=metric).scores
    with backends.use(backend):
        actual = ssah.attribute(model.cuda(), rows, metric=metric).scores
    for name, score in expected.items():
        torch.testing.assert_close(
            actual[name].cpu(), score, rtol=1e-3, atol=1e-4 * score.max().item()
        )
