"""What is checked of an operator, an optimiser and scores on a device: test_gpu.py, runs/gpu.sh.

A call on the device takes the arguments of a case of ``cases.py`` and gives its results back to the
CPU, where they are compared with the reference: float64, made of torch's operators. Most of it runs
with the CPU as the device too; streams and graphs are a GPU's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from cases import CASES, copied, flat, results
from samples import Sample
from torch import Tensor

from ssah_kernels import backends


def moved(op: str, backend: str, device: str = "cuda") -> Callable[..., Any]:
    """The operator on a device, for arguments on the CPU, with their strides and their memory."""

    def call(*args: Any, **kwargs: Any) -> list[Tensor]:
        mine = [copied(a, device) for a in args]
        with backends.use(backend):
            returned = getattr(torch.ops.ssah, op)(*mine, **kwargs)
        for i in CASES[op].outputs:
            for theirs, own in zip(flat(args[i]), flat(mine[i]), strict=True):
                theirs.copy_(own)
        return [r.cpu() for r in flat(returned)]

    return call


def one_sample(op: str, dtype: torch.dtype) -> Sample:
    """A call with rows and channels that fill no tile."""
    return next(s for s in CASES[op].samples(dtype) if "131" in s.name)


def fill(args: list[Any], values: list[Any]) -> None:
    """Copy the tensors of ``values`` into those of ``args``, of any shapes."""
    for to, value in zip(args, values, strict=True):
        for own, source in zip(flat_tensors(to), flat_tensors(value), strict=True):
            own.copy_(source)


def flat_tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument, which may be a number or a list with None in it."""
    each = value if isinstance(value, list) else [value]
    return [one for one in each if isinstance(one, Tensor)]


def written(op: str, returned: Any, args: list[Any]) -> list[Tensor]:
    """Copies on the CPU of everything that a call wrote."""
    given = [i for i in CASES[op].outputs if i < len(args)]  # the last ones may be left out
    return [t.cpu() for t in [*flat(returned), *(t for i in given for t in flat(args[i]))]]


def check_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Assert that all are equal, bit for bit but for what is not a number."""
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.nan_to_num(), e.nan_to_num())


def check_side_stream(op: str, backend: str) -> None:
    """Inputs that another stream is still writing, behind a long wait, give the right result."""
    sample = one_sample(op, torch.float32)
    expected = results(CASES[op], moved(op, backend), sample)
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
                fill([late], [value])
        returned = getattr(torch.ops.ssah, op)(*args, **sample.kwargs)
        actual = written(op, returned, args)
    check_equal(actual, expected)


def check_second_device(op: str, backend: str) -> None:
    """A call runs on the device of its tensors, with the same bits, and the current one stays."""
    sample = one_sample(op, torch.bfloat16)
    torch.cuda.set_device(0)
    first, second = (
        results(CASES[op], moved(op, backend, d), sample) for d in ("cuda:0", "cuda:1")
    )
    assert torch.cuda.current_device() == 0
    check_equal(second, first)


def capturable(op: str) -> bool:
    """Whether a CUDA graph can hold the operator, by what it says of itself."""
    return torch.Tag.cudagraph_unsafe not in getattr(torch.ops.ssah, op).default.tags


def check_captured(op: str, backend: str) -> None:
    """A CUDA graph of a call, replayed twice from the same start, gives the bits of the call."""
    sample = one_sample(op, torch.float32)
    expected = results(CASES[op], moved(op, backend), sample)
    start = [copied(a, "cuda") for a in sample.args]
    args = [copied(a) for a in start]
    call = getattr(torch.ops.ssah, op)
    with backends.use(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(*(copied(a) for a in start), **sample.kwargs)  # what compiles is no part of it
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = call(*args, **sample.kwargs)
    for _ in range(2):
        fill(args, start)  # capturing has run nothing: there was nothing to undo the first time
        graph.replay()
        torch.cuda.synchronize()
        check_equal(written(op, returned, args), expected)


def check_optimizer(optimizer: type, rounding: str, backend: str, device: str = "cuda") -> None:
    """Ten steps of compact and of indexed parameters, clipped, with importance, as on the CPU."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=g).bfloat16() for s in ((40, 264), (5, 520), (77,))]
    grads = [[torch.randn(p.shape, generator=g).bfloat16() for p in start] for _ in range(10)]
    after = []
    for where, serves in (("cpu", "cpu"), (device, backend)):
        params = [torch.nn.Parameter(p.to(where, copy=True)) for p in start]
        index = torch.arange(0, 40, 3, device=where)
        groups = [{"params": params[:1], "indices": [index]}, {"params": params[1:]}]
        o = optimizer(groups, lr=1e-2, rounding=rounding, max_norm=1.0, track_importance=True)
        with backends.use(serves):
            for step in grads:
                for p, grad in zip(params, step, strict=True):
                    p.grad = grad.to(where)
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


@contextmanager
def no_waiting() -> Iterator[None]:
    """In here whatever waits for the GPU is an error: a copy of a number, a boolean index."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_steps_wait_for_nothing(optimizer: type, backend: str) -> None:
    """From the second step on; in the first, state and tables are made."""
    params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in ((40, 264), (77,))]
    index = torch.arange(0, 40, 3, device="cuda")
    o = optimizer([{"params": params[:1], "indices": [index]}, {"params": params[1:]}], lr=1e-2)
    with backends.use(backend):
        for step in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            with no_waiting() if step else nullcontext():
                o.step()


def check_batches_wait_for_nothing(metric: str, backend: str) -> None:
    """From the third batch on, while a batch is scored: the last results may be waited for."""
    import tiny_models

    import ssah

    model = tiny_models.build("llama").eval().to("cuda")
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (6, 4, 11), generator=g)

    rows = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]

    def batches() -> Iterator[dict[str, Tensor]]:
        yield from rows[:2]
        with no_waiting():
            yield from rows[2:]

    with backends.use(backend):
        ssah.attribute(model, batches(), metric=metric)


def check_attribution(metric: str, backend: str, device: str = "cuda") -> None:
    """Scores of a tiny model on ragged rows are those of the CPU."""
    import tiny_models

    import ssah

    model = tiny_models.build("llama").eval()
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (6, 11), generator=g)
    mask = torch.ones_like(ids)
    mask[1::2, 7:] = 0
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}]
    expected = ssah.attribute(copy.deepcopy(model), rows, metric=metric).scores
    with backends.use(backend):
        actual = ssah.attribute(model.to(device), rows, metric=metric).scores
    for name, score in expected.items():
        torch.testing.assert_close(
            actual[name].cpu(), score, rtol=1e-3, atol=1e-4 * score.max().item()
        )
