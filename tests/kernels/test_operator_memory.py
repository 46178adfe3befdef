"""Layouts, overlaps and values of indices: right in every backend, or refused by name."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ssah_kernels
from ssah_kernels import ops, overlap
from ssah_kernels.optim import MaskedAdamW, MaskedSGD

F64 = torch.float64
BACKENDS = ["reference", "cpu"]


def adamw(
    params: list[Tensor],
    indices: list[Tensor | None] | None = None,
    dims: list[int] | None = None,
    **changed: Any,
) -> dict[str, Any]:
    """The arguments of a call with zero state."""
    n = len(params)
    indices, dims = indices or [None] * n, dims or [0] * n
    grads = [
        torch.ones_like(
            p if i is None else p.index_select(d, i), memory_format=torch.contiguous_format
        )
        for p, i, d in zip(params, indices, dims, strict=True)
    ]
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": [g.float() * 0 for g in grads],
        "exp_avg_sqs": [g.float() * 0 for g in grads],
    }
    scalars = {"lr": torch.tensor(0.1), "step": torch.tensor(1.0)}
    return {**lists, "indices": indices, "dims": dims, **scalars, **changed}


def layouts(shape: tuple[int, ...]) -> list[Tensor]:
    """Random tensors of one shape in every order of dimensions, with and without gaps."""
    found = []
    for order in itertools.permutations(range(len(shape))):
        for gap in (1, 2):
            x = torch.randn([shape[d] * gap for d in order])[
                tuple(slice(None, None, gap) for _ in order)
            ]
            found.append(x.permute([order.index(d) for d in range(len(shape))]))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(3, 4, 2), (2, 3, 4, 5), (1, 3, 1), (0, 4, 2), (3, 0, 2), (2, 3, 0)]
)
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("op", ["adamw", "sgd"])
def test_parameters_of_any_strides(backend: str, shape: tuple[int, ...], dim: int, op: str) -> None:
    torch.manual_seed(0)
    some = torch.arange(0, shape[dim], 2)
    for param, index in itertools.product(layouts(shape), (None, some)):
        base, before = param._base if param._base is not None else param, param.clone()
        outside = torch.ones(base.shape, dtype=torch.bool)
        inner = outside.as_strided(param.shape, param.stride(), param.storage_offset())
        inner[:] = False
        around = base.clone()
        call = adamw([param], [index], [dim])
        call["grads"][0].normal_()
        expected = before.clone(memory_format=torch.contiguous_format)
        plain = {**call, "params": [expected]}
        plain |= {k: [t.clone() for t in call[k]] for k in ("exp_avgs", "exp_avg_sqs")}
        if op == "sgd":
            for each in (call, plain):
                each["momentum_buffers"] = each.pop("exp_avgs")
                del each["exp_avg_sqs"]
        update = ops.masked_adamw_ if op == "adamw" else ops.masked_sgd_
        with ssah_kernels.use(backend):
            update(**call)
            update(**plain)
        assert torch.equal(param, expected)
        assert torch.equal(base[outside], around[outside])
        frozen = torch.ones(shape, dtype=torch.bool)
        frozen.index_fill_(dim, torch.arange(shape[dim]) if index is None else index, False)
        assert torch.equal(param[frozen], before[frozen])
        if param.numel() and (index is None or len(index)):
            assert not torch.equal(param, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_any_strides(backend: str) -> None:
    for shape, dim in itertools.product([(3, 4, 2), (0, 4, 2), (2, 3, 4, 5)], (0, -1)):
        for grad in layouts(shape):
            index = torch.arange(0, shape[dim], 2)
            with ssah_kernels.use(backend):
                norm = ops.masked_grad_norm([grad], [index], [dim])
            torch.testing.assert_close(norm, grad.index_select(dim, index).double().norm())


def parameters() -> list[torch.nn.Parameter]:
    """Layouts that a user's model has."""
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).weight
    others = (
        torch.randn(3, 4, 2).transpose(1, 2),
        torch.randn(3, 4, 2).transpose(0, 1),
        torch.zeros(0, 4, 2),
        torch.randn(6),
        torch.randn(()),
        torch.randn(4, 6).t(),
    )
    return [conv, *map(torch.nn.Parameter, others)]


@pytest.mark.parametrize("ours", [MaskedAdamW, MaskedSGD])
@pytest.mark.parametrize("dim", [0, -1])
def test_optimisers_equal_torch_in_every_layout(ours: type, dim: int) -> None:
    theirs = {MaskedAdamW: torch.optim.AdamW, MaskedSGD: torch.optim.SGD}[ours]
    mine, its = parameters(), parameters()
    first = ours([{"params": mine, "dims": dim}], lr=0.1, weight_decay=0.1)
    second = theirs(its, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(mine, its, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(mine, its, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert p.stride() == q.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([1, 0]), r"indices\[1\] has 0 after 1 at position 1"),
        (torch.tensor([0, 2, 2]), r"indices\[1\] has 2 after 2 at position 2"),
        (torch.tensor([0, 4]), r"indices\[1\] goes from 0 to 4; it must stay within 0 to 3"),
        (torch.tensor([-1, 2]), r"indices\[1\] goes from -1 to 2"),
        (torch.tensor([0, 0, 2, 2])[::2], r"indices\[1\] has stride 2; it must be contiguous"),
        (torch.tensor([0, 1], dtype=torch.int32), r"indices\[1\] is torch.int32"),
        (torch.tensor([[0, 1]]), r"indices\[1\] is torch.int64 with 2 dimensions"),
    ],
)
def test_bad_indices_are_named(backend: str, index: Tensor, message: str) -> None:
    params = [torch.zeros(4, 3), torch.zeros(4, 3)]
    call = adamw(params, [None, torch.arange(index.numel() % 4)])
    call["indices"][1] = index
    with ssah_kernels.use(backend):
        for function, args in (
            (
                ops.masked_adamw_,
                {**call, "grads": [torch.ones(4, 3), torch.ones(*index.shape[-1:], 3)]},
            ),
            (ops.masked_grad_norm, {"grads": params, "indices": call["indices"], "dims": [0, 0]}),
        ):
            if function is ops.masked_adamw_:
                for name in ("exp_avgs", "exp_avg_sqs"):
                    args[name] = [torch.zeros_like(g) for g in args["grads"]]
            with pytest.raises(ValueError, match=message):
                function(**args)
    assert all((p == 0).all() for p in params)


def test_indices_are_read_again_after_they_change() -> None:
    index = torch.tensor([0, 2])
    call = adamw([torch.zeros(4, 3)], [index])
    ops.masked_adamw_(**call)
    index[1] = 7
    with pytest.raises(ValueError, match="goes from 0 to 7"):
        ops.masked_adamw_(**call)
    index[1] = 3
    ops.masked_adamw_(**call)
    with torch.inference_mode():
        ops.masked_adamw_(**adamw([torch.zeros(4, 3)], [torch.tensor([0, 2])]))
        with pytest.raises(ValueError, match="has 0 after 2"):
            ops.masked_adamw_(**adamw([torch.zeros(4, 3)], [torch.tensor([2, 0])]))


def of_moments(**changed: Tensor) -> dict[str, Tensor]:
    x = torch.zeros(4, 6, dtype=F64)
    count, mean, m2 = ops.new_moments(x)
    return {"x": x, "count": count, "mean": mean, "m2": m2, **changed}


def share_moments() -> list[tuple[str, Callable[[], Any]]]:
    mean = torch.zeros(6, dtype=F64)
    flat = torch.zeros(40, dtype=F64)
    several = mean[:1].expand(6)
    return [
        ("count and mean", lambda: ops.channel_moments_(**of_moments(mean=mean, count=mean[3]))),
        ("mean and m2", lambda: ops.channel_moments_(**of_moments(mean=mean, m2=mean))),
        ("mean and x", lambda: ops.channel_moments_(**of_moments(mean=mean, x=mean[None]))),
        ("m2 and x", lambda: ops.channel_moments_(
            **of_moments(x=flat[:24].view(4, 6), m2=flat[20:26]))),
        ("mean and gate", lambda: ops.gated_moments(
            mean[None], mean[None] + 1, mean.new_zeros(()), mean, mean + 1)),
        ("signed and squared", lambda: ops.taylor_moments_(
            torch.zeros(4, 6), torch.zeros(4, 6), mean, mean)),
        ("squared and grad", lambda: ops.taylor_moments_(
            torch.zeros(6, dtype=F64), mean, mean + 1, mean)),
        ("mean must be contiguous", lambda: ops.channel_moments_(**of_moments(mean=several))),
    ]  # fmt: skip


@pytest.mark.parametrize(("words", "call"), share_moments())
def test_moments_that_share_memory_are_refused(words: str, call: Callable[[], Any]) -> None:
    match = words if "must" in words else f"{words} share memory"
    with pytest.raises(ValueError, match=match):
        call()


def share_updates() -> list[tuple[str, dict[str, Any]]]:
    p, q, flat = torch.ones(4, 3), torch.ones(4, 3), torch.ones(100)
    state, square = torch.zeros(4, 3), flat.view(10, 10)
    rolling = torch.ones(20).as_strided((4, 3), (1, 1))
    woven = torch.ones(30).as_strided((3, 4), (3, 2))  # 6 is both [2, 0] and [0, 3]
    return [
        (r"params\[0\] has several elements", adamw([torch.ones(1, 3).expand(4, 3)])),
        (r"params\[0\] has several elements", adamw([torch.ones(4, 1).expand(4, 3)])),
        (r"params\[1\] has several elements", adamw([p, rolling])),
        (r"params\[0\] has several elements", adamw([woven])),
        (r"params\[0\] and params\[1\] share", adamw([p, p])),
        (r"params\[0\] and params\[1\] share", adamw([p, p.t()])),
        (r"params\[0\] and params\[1\] share", adamw([flat[:12], flat[11:23]])),
        (r"params\[0\] and params\[2\] share", adamw([p, q, p[1:]])),
        (r"params\[0\] and grads\[0\] share", adamw([p], grads=[p])),
        (r"exp_avgs\[0\] and exp_avg_sqs\[0\] share",
         adamw([p], exp_avgs=[state], exp_avg_sqs=[state])),
        (r"exp_avgs\[0\] and exp_avgs\[1\] share", adamw([p, q], exp_avgs=[state, state])),
        (r"params\[0\] and exp_avgs\[0\] share", adamw([p], exp_avgs=[p])),
        (r"exp_avgs\[0\] and grads\[0\] share", adamw([p], exp_avgs=[state], grads=[state])),
        (r"params\[0\] and params\[1\] share", adamw([square[:, :5], square[:, 4:]])),
        (r"params\[0\] and params\[1\] share", adamw([square[:, ::2], flat[2:5]])),
    ]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), share_updates())
@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_that_share_memory_are_refused(
    message: str, call: dict[str, Any], backend: str
) -> None:
    before = [p.clone() for p in call["params"]]
    with ssah_kernels.use(backend), pytest.raises(ValueError, match=message):
        ops.masked_adamw_(**call)
    assert all(torch.equal(a, b) for a, b in zip(call["params"], before, strict=True))


def test_neighbours_in_one_tensor_are_no_overlap() -> None:
    whole = torch.randn(12, 12)
    pieces = [
        whole[:4], whole[4:8, :5], whole[4:8, 5:9], whole[4:8, 9:].t(), whole[8:, ::2],
        whole[8:, 1::2],
    ]  # fmt: skip
    expected = [p.clone() for p in pieces]
    grad = torch.ones(1)
    for arguments in (pieces, expected):
        call = adamw(arguments)
        ops.masked_adamw_(**call)
    assert all(torch.equal(p, e) for p, e in zip(pieces, expected, strict=True))
    shared = grad.expand(4, 12)  # what is only read may lie anywhere
    ops.masked_adamw_(**adamw([whole[:4]], grads=[shared]))


def test_overlap_is_exact() -> None:
    """Against the sets of addresses, of random views of one buffer in two element sizes."""
    draw = random.Random(0)
    buffer = torch.zeros(64, dtype=torch.float32)

    def view() -> Tensor:
        base = buffer if draw.random() < 0.7 else buffer.view(torch.bfloat16)
        shape = [draw.randrange(0, 4) for _ in range(draw.randrange(0, 4))]
        strides = [draw.randrange(0, 6) for _ in shape]
        offset = draw.randrange(0, 24)
        return base.as_strided(shape, strides, offset)

    def addresses(x: Tensor) -> list[set[int]]:
        offsets = [
            sum(i * s for i, s in zip(at, x.stride(), strict=True))
            for at in itertools.product(*(range(n) for n in x.shape))
        ]
        size = x.element_size()
        return [set(range(x.data_ptr() + o * size, x.data_ptr() + (o + 1) * size)) for o in offsets]

    hits = 0
    for _ in range(3000):
        a, b = view(), view()
        bytes_a, bytes_b = addresses(a), addresses(b)
        inside = sum(map(len, bytes_a)) > len(set().union(*bytes_a))
        shared = bool(set().union(*bytes_a) & set().union(*bytes_b))
        assert overlap.within(a) == inside
        assert overlap.between(a, b) == shared, (a.shape, a.stride(), b.shape, b.stride())
        c = view()
        pairs = {(0, 0)} if inside else set()
        written_c = set().union(*addresses(c))
        if shared:
            pairs.add((0, 1))
        if set().union(*bytes_a) & written_c:
            pairs.add((0, 2))
        found = overlap.first([a], [b, c])
        assert (found is None) == (not pairs)
        assert found is None or found in pairs
        hits += shared
    assert 100 < hits < 2900


def other_layouts() -> list[tuple[str, Tensor]]:
    x = torch.ones(4, 6)
    return [
        ("torch.sparse_coo", x.to_sparse()),
        ("torch.sparse_csr", x.to_sparse_csr()),
        ("torch._mkldnn", x.to_mkldnn()),
    ]


@pytest.mark.parametrize(("layout", "tensor"), other_layouts())
def test_other_layouts_are_named(layout: str, tensor: Tensor) -> None:
    x, words = torch.ones(4, 6), f"has layout {layout}; it must be torch.strided"
    calls = {
        "x": lambda: ops.channel_moments_(tensor, *ops.new_moments(x)),
        "up": lambda: ops.gated_moments(x, tensor, *ops.new_moments(x)),
        "grad": lambda: ops.taylor_moments_(x, tensor, *ops.new_moments(x)[1:]),
        "weight": lambda: ops.column_sq_norms(tensor),
        r"params\[0\]": lambda: ops.masked_adamw_(**{**adamw([x]), "params": [tensor]}),
        r"grads\[0\]": lambda: ops.masked_adamw_(**adamw([x], grads=[tensor])),
        r"exp_avgs\[0\]": lambda: ops.masked_adamw_(**adamw([x], exp_avgs=[tensor])),
        r"params\[1\]": lambda: ops.masked_adamw_(
            **{**adamw([x, x.clone()]), "params": [x, tensor]}
        ),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} {words}"):
            call()
    for optimizer in (MaskedAdamW, MaskedSGD):
        with pytest.raises(TypeError, match=rf"params\[0\] {words}"):
            optimizer([torch.nn.Parameter(tensor)])


def test_negated_views_are_right_or_refused() -> None:
    x = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    state, expected = ops.new_moments(x), ops.new_moments(x)
    ops.channel_moments_(x, *state)
    ops.channel_moments_(x.resolve_neg(), *expected)
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
    with pytest.raises(RuntimeError, match="negat"):
        ops.masked_adamw_(**{**adamw([x.clone()]), "params": [x]})
    with pytest.raises(TypeError, match=r"params\[0\] is a negated view"):
        MaskedAdamW([x.detach().requires_grad_()])


@pytest.mark.parametrize("op", ["channel", "taylor", "gated", "norms"])
def test_rows_without_end_are_refused(op: str) -> None:
    x = torch.ones(1, 1).expand(2**33, 1)
    calls = {
        "channel": lambda: ops.channel_moments_(x, *ops.new_moments(x[:1])),
        "taylor": lambda: ops.taylor_moments_(x, x, *ops.new_moments(x[:1])[1:]),
        "gated": lambda: ops.gated_moments(x, x, *ops.new_moments(x[:1])),
        "norms": lambda: ops.column_sq_norms(x),
    }
    with pytest.raises(ValueError, match="has 8589934592 rows; it must have at most 2"):
        calls[op]()


def test_long_values_are_cut_in_errors() -> None:
    x = torch.ones(2, 3)
    long = "a" * 2**20
    for call in (
        lambda: ops.gated_moments(x, x, *ops.new_moments(x), act=long),
        lambda: MaskedAdamW([x], rounding=long),
        lambda: ssah_kernels.use(long).__enter__(),
    ):
        with pytest.raises(ValueError, match="1048578 characters") as raised:
            call()
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize("seed", [torch.tensor(True), torch.tensor(1j), torch.tensor(1.0)])
def test_a_seed_is_a_whole_number(seed: Tensor) -> None:
    with pytest.raises(ValueError, match="seed is torch"):
        ops.masked_adamw_(**adamw([torch.ones(3, 2).bfloat16()], seed=seed))
    for name in ("lr", "step", "grad_scale", "clip_coef"):
        with pytest.raises(ValueError, match=f"{name} is torch.complex64"):
            ops.masked_adamw_(**adamw([torch.ones(3, 2)], **{name: torch.tensor(1j)}))
