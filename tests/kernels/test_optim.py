"""MaskedAdamW and MaskedSGD: as torch's own, with importance and clipping, resumed bit for bit."""

from __future__ import annotations

import copy
import io
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssah_kernels.optim import MaskedAdamW, MaskedSGD

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def importance_by_hand(p: Tensor, g: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    product = p.detach().double() * g.double()
    return product.sum(1 - dim), product.square().sum(1 - dim)


@pytest.mark.parametrize("optimizer", [MaskedAdamW, MaskedSGD])
@pytest.mark.parametrize("dim", [0, 1])
def test_importance_equals_float64(optimizer: type, dim: int) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(70, 1300))
    index = torch.randperm(p.shape[dim])[:60].sort().values
    group = {"params": [p], "indices": [index], "dims": [dim]}
    o = optimizer([group], lr=1e-2, track_importance=True, max_norm=1.0)
    assert o.importance() == {}
    signed, squared = torch.zeros(60, dtype=F64), torch.zeros(60, dtype=F64)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        parts = (t.index_select(dim, index) for t in (p, p.grad))
        for total, part in zip((signed, squared), importance_by_hand(*parts, dim), strict=True):
            total += part
        o.step()
    for actual, expected in zip(o.importance()[p], (signed, squared), strict=True):
        assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


def pair(optimizer: str, shapes: tuple[tuple[int, ...], ...], **options: object) -> tuple:
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(s, dtype=F64)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    kinds = {"adamw": (MaskedAdamW, torch.optim.AdamW), "sgd": (MaskedSGD, torch.optim.SGD)}
    mine, its = kinds[optimizer]
    return ours, mine(ours, **options), theirs, its(theirs, **options)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw", {"lr": 1e-2}),
        ("adamw", {"lr": 1e-2, "betas": (0.5, 0.9), "weight_decay": 0.3, "maximize": True}),
        ("adamw", {"lr": torch.tensor(1e-2, dtype=F64)}),
        ("sgd", {"lr": 1e-2}),
        ("sgd", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("sgd", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.4, "maximize": True}),
    ],
)
def test_equals_torch_under_a_schedule(optimizer: str, options: dict) -> None:
    ours, mine, theirs, its = pair(optimizer, ((4, 7), (7,), (), (2, 3, 4)), **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (mine, its)]
    for i in range(8):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = None if i == 3 and p.dim() == 1 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        mine.step()
        its.step()
        for schedule in schedules:
            schedule.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_max_norm_clips_all_gradients_together() -> None:
    ours, _, theirs, its = pair("sgd", ((4, 7), (9,)), lr=0.1)
    mine = MaskedSGD([{"params": [ours[0]]}, {"params": [ours[1]]}], lr=0.1, max_norm=0.7)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    mine.step()
    its.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_max_norm_leaves_smaller_gradients_alone() -> None:
    ours, _, theirs, its = pair("sgd", ((4, 7), (9,)), lr=0.1)
    mine = MaskedSGD(ours, lr=0.1, max_norm=1e3)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    mine.step()
    its.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def training(rounding: str, state: torch.dtype | None) -> tuple[list[Tensor], MaskedAdamW, object]:
    torch.manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(s).to(BF16)) for s in ((6, 10), (10, 6), (5,))]
    params.append(torch.nn.Parameter(torch.randn(3, 3)))
    groups = [
        {
            "params": params[:2],
            "indices": [torch.tensor([0, 2]), torch.tensor([3])],
            "dims": [1, 0],
        },
        {"params": params[2:], "weight_decay": 0.0},
    ]
    options = {"rounding": rounding, "state_dtype": state, "seed": 9, "max_norm": 1.0}
    o = MaskedAdamW(groups, lr=1e-2, track_importance=True, **options)
    return params, o, torch.optim.lr_scheduler.StepLR(o, 3, 0.5)


def advance(params: list[Tensor], o: MaskedAdamW, schedule: object, steps: range) -> None:
    for t in steps:
        g = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        o.step()
        schedule.step()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
@pytest.mark.parametrize("state", [None, BF16])
def test_resumed_run_equals_uninterrupted(rounding: str, state: torch.dtype | None) -> None:
    whole, o, schedule = training(rounding, state)
    advance(whole, o, schedule, range(9))

    params, first, its_schedule = training(rounding, state)
    advance(params, first, its_schedule, range(4))
    file = io.BytesIO()
    torch.save([first.state_dict(), its_schedule.state_dict(), [p.data for p in params]], file)
    file.seek(0)
    saved, schedule_state, weights = torch.load(file, weights_only=True)
    resumed, second, its_schedule = training(rounding, state)
    with torch.no_grad():
        for p, w in zip(resumed, weights, strict=True):
            p.copy_(w)
    second.load_state_dict(saved)
    its_schedule.load_state_dict(schedule_state)
    for p in resumed:
        dtype = state or F32
        assert second.state[p]["exp_avg"].dtype == dtype
    advance(resumed, second, its_schedule, range(4, 9))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)
        for name, value in o.state[a].items():
            assert torch.equal(value, second.state[b][name]), name
            assert value.dtype == second.state[b][name].dtype


@pytest.mark.parametrize("experts", [1, 3])
def test_experts_resume(experts: int) -> None:
    """Two of five units train in each. State of several lies flat, that of one does not."""
    index = torch.tensor([5 * e + unit for e in range(experts) for unit in (1, 3)])
    g = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(experts, 5, 8, generator=g) for _ in range(2))
    found = []
    for resumed in (False, True):
        p = torch.nn.Parameter(start.clone())
        group = {"params": [p], "indices": [index], "dims": [(0, 1)]}
        optimizer = MaskedAdamW([dict(group)], lr=0.1)
        for step in range(3):
            if resumed and step == 1:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = MaskedAdamW([dict(group)], lr=0.1)
                optimizer.load_state_dict(state)
            p.grad = grad.clone()
            optimizer.step()
        moved = (p.detach() != start).flatten(0, 1).any(1).nonzero()[:, 0]
        assert torch.equal(moved, index)
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [1, 2])
def test_a_step_of_experts_makes_one_entry_of_rows_and_no_view_of_state_again(
    dim: int, transposed: bool
) -> None:
    """Of experts that lie apart, the rows cannot be one matrix: they are an entry each."""
    g = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(3, 4, 4, generator=g) for _ in range(2))
    start = start.transpose(0, 1) if transposed else start
    p = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
    trains = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]) > 0
    trains = trains[: len(p), : p.shape[dim]]
    optimizer = MaskedAdamW(
        [{"params": [p], "indices": [trains.flatten().nonzero()[:, 0]], "dims": [(0, dim)]}],
        lr=0.1,
        weight_decay=0.0,
    )
    whole = torch.optim.AdamW([q := torch.nn.Parameter(start.clone())], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        p.grad, q.grad = (grad.clone().view(q.shape) for _ in range(2))
        optimizer.step()
        whole.step()
    mask = trains[:, :, None] if dim == 1 else trains[:, None]
    torch.testing.assert_close(p.detach(), torch.where(mask, q.detach(), start))
    assert torch.equal(p.detach()[~mask.expand_as(p)], start[~mask.expand_as(p)])
    p.grad = grad.clone().view(p.shape)
    (_, first), (_, again) = (optimizer._calls(optimizer.entries())[0] for _ in range(2))
    assert len(first.params) == (1 if dim == 1 and not transposed else int(trains.any(1).sum()))
    for name in ("exp_avg", "exp_avg_sq"):
        for own, same in zip(first.state(name) or (), again.state(name) or (), strict=True):
            assert own is same


@pytest.mark.parametrize("way", ["in place", "by data"])
def test_an_index_of_experts_that_was_changed_is_followed(way: str) -> None:
    """As one of other parameters is: unit 1 of each of two experts trains, and then unit 2."""
    p = torch.nn.Parameter(torch.zeros(2, 3, 4))
    index = torch.tensor([1, 4])
    optimizer = MaskedAdamW([{"params": [p], "indices": [index], "dims": [(0, 1)]}], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before = p.detach().clone()
    if way == "in place":
        index += 1
    else:
        index.data = index.data + 1
    optimizer.step()
    moved = (p.detach() != before).flatten(0, 1).any(1).nonzero()[:, 0]
    assert moved.tolist() == [2, 5]


def test_a_parameter_without_a_buffer_does_not_take_that_of_others_away() -> None:
    """One that was loaded without its buffer is no part of a call with buffers."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in "ab"]
    optimizer = MaskedSGD(params, lr=0.1, momentum=0.9)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    del optimizer.state[params[0]]["momentum_buffer"]
    assert [len(call.params) for _, call in optimizer._calls(optimizer.entries())] == [1, 1]


def test_deepcopy_continues_alike() -> None:
    params, o, schedule = training("stochastic", BF16)
    advance(params, o, schedule, range(2))
    twins, twin, its_schedule = copy.deepcopy((params, o, schedule))
    advance(params, o, schedule, range(2, 4))
    advance(twins, twin, its_schedule, range(2, 4))
    for a, b in zip(params, twins, strict=True):
        assert a is not b
        assert torch.equal(a, b)


def test_groups_do_not_share_noise() -> None:
    ps = [torch.nn.Parameter(torch.ones(4000, dtype=BF16)) for _ in "ab"]
    o = MaskedAdamW([{"params": [p]} for p in ps], lr=1e-3, rounding="stochastic")
    for p in ps:
        p.grad = torch.ones_like(p)
    o.step()
    assert not torch.equal(*ps)


def test_wrong_use_is_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3))
    for group, message in (
        ({"indices": [torch.tensor([], dtype=torch.int64)]}, "must have entries to train"),
        ({"indices": [torch.tensor([1, 1])]}, "strictly increasing"),
        ({"dims": [(1, 0)]}, r"dims\[0\] is \(1, 0\).*a pair must be \(0, d\)"),
        ({"indices": [torch.tensor([0, 4])]}, "within 0 to 3"),
        ({"indices": [None, None]}, "one a parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedAdamW([{"params": [p], **group}])
    for options, message in (
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"state_dtype": F16}, "state_dtype is torch.float16"),
        ({"max_norm": 0.0}, "max_norm is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedAdamW([p], **options)
    with pytest.raises(ValueError, match="nesterov"):
        MaskedSGD([p], nesterov=True)
    with pytest.raises(RuntimeError, match="track_importance"):
        MaskedAdamW([p]).importance()


def test_resuming_with_other_units_is_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.ones_like(p)

    def optimizer(*rows: int) -> MaskedAdamW:
        return MaskedAdamW([{"params": [p], "indices": [torch.tensor(rows)]}])

    saved = optimizer(0, 2)
    saved.step()
    with pytest.raises(ValueError, match="other entries than in the checkpoint"):
        optimizer(0, 3).load_state_dict(saved.state_dict())
    compact = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (2, 3)]
    for q in compact:
        q.grad = torch.ones_like(q)
    first, second = (MaskedAdamW([q]) for q in compact)
    first.step()
    with pytest.raises(ValueError, match="another selection of units"):
        second.load_state_dict(first.state_dict())


def test_plain_loop_example(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "plain_loop.py"
    runpy.run_path(str(path), run_name="__main__")
    assert "frozen weights unchanged" in capsys.readouterr().out


@pytest.mark.parametrize("cls", [MaskedAdamW, MaskedSGD])
def test_a_step_that_fails_does_not_count(cls: type[torch.optim.Optimizer]) -> None:
    def make() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
        return parameter, cls([{"params": [parameter], "indices": [torch.tensor([0, 2])]}], lr=0.1)

    (twin, steady), (parameter, optimizer) = make(), make()
    for step in range(3):
        for _ in range(2):
            optimizer.param_groups[0]["lr"] = "fast"
            parameter.grad = torch.ones(4, 3)
            with pytest.raises((TypeError, ValueError)):
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1
        for p, o in ((parameter, optimizer), (twin, steady)):
            p.grad = torch.full((4, 3), float(step + 1))
            o.step()
    assert float(optimizer.state[parameter]["step"]) == 3
    assert torch.equal(parameter, twin)
