"""What MaskedAdamW and MaskedSGD refuse by name when they are made, before any step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssah_kernels.optim import MaskedAdamW, MaskedSGD

INF, NAN = float("inf"), float("nan")
BOTH = (MaskedAdamW, MaskedSGD)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*(shape or (4, 3))))


@pytest.mark.parametrize(
    ("optimizers", "options", "words"),
    [
        (BOTH, {"lr": INF}, "lr is inf"),
        (BOTH, {"lr": NAN}, "lr is nan"),
        (BOTH, {"lr": torch.tensor(NAN)}, "lr is nan"),
        (BOTH, {"lr": torch.zeros(2)}, "lr is a torch.float32 tensor of shape"),
        (BOTH, {"lr": "1e-3"}, "lr is '1e-3'; it must be a number"),
        (BOTH, {"lr": None}, "lr is None"),
        (BOTH, {"weight_decay": INF}, "weight_decay is inf"),
        (BOTH, {"weight_decay": NAN}, "weight_decay is nan"),
        (BOTH, {"seed": "x"}, "seed is 'x'"),
        (BOTH, {"seed": None}, "seed is None"),
        (BOTH, {"seed": 1.5}, "seed is 1.5"),
        (BOTH, {"max_norm": NAN}, "max_norm is nan"),
        (BOTH, {"max_norm": "1"}, "max_norm is '1'"),
        ((MaskedAdamW,), {"eps": INF}, "eps is inf"),
        ((MaskedAdamW,), {"eps": NAN}, "eps is nan"),
        ((MaskedAdamW,), {"betas": (0.9,)}, r"betas is \(0.9,\); it must be two numbers"),
        ((MaskedAdamW,), {"betas": (0.9, 0.99, 0.5)}, "it must be two numbers"),
        ((MaskedAdamW,), {"betas": 0.9}, "betas is 0.9; it must be two numbers"),
        ((MaskedAdamW,), {"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ((MaskedAdamW,), {"betas": (NAN, 0.9)}, r"betas\[0\] is nan"),
        ((MaskedSGD,), {"momentum": INF}, "momentum is inf"),
        ((MaskedSGD,), {"momentum": 0.9, "dampening": NAN}, "dampening is nan"),
        ((MaskedSGD,), {"nesterov": True}, "nesterov needs a momentum"),
    ],
)
def test_options_are_refused_by_name(
    optimizers: tuple[type, ...], options: dict[str, Any], words: str
) -> None:
    for optimizer in optimizers:
        with pytest.raises((TypeError, ValueError), match=words):
            optimizer([parameter()], **options)
        with pytest.raises((TypeError, ValueError), match=words):  # a group's own
            optimizer([{"params": [parameter()], **options}])


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"indices": 3}, "indices is a int; it must be a list"),
        ({"indices": torch.tensor([0])}, "indices is a Tensor; it must be a list"),
        ({"indices": [[0, 2]]}, r"indices\[0\] is a list; it must be an int64 tensor or None"),
        ({"indices": [torch.tensor([0.0])]}, r"indices\[0\] is torch.float32"),
        ({"indices": [torch.tensor([2, 1])]}, r"indices\[0\] has 1 after 2"),
        ({"indices": [torch.tensor([-1, 1])]}, r"indices\[0\] goes from -1 to 1"),
        ({"dims": [2]}, r"dims\[0\] is 2 for a parameter of 2 dimensions"),
        ({"dims": "0"}, "dims is a str"),
        ({"params": [parameter(())], "indices": [torch.tensor([0])]}, "without dimensions"),
        ({"params": [parameter(2, 3, 4)], "dims": 1}, r"dims\[0\] is 1 .*first or the last"),
        (
            {"params": [nn.Parameter(torch.ones(1, 3).expand(4, 3))]},
            r"params\[0\] has several elements in one place",
        ),
        (
            {"params": [torch.ones(2, dtype=torch.complex64)]},
            r"params\[0\] has dtype torch.complex",
        ),
    ],
)
@pytest.mark.parametrize("optimizer", BOTH)
def test_groups_are_refused_by_name(optimizer: type, group: dict[str, Any], words: str) -> None:
    whole = optimizer([parameter()])
    for make in (
        lambda: optimizer([{"params": [parameter()], **group}]),
        lambda: whole.add_param_group({"params": [parameter()], **group}),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            make()
    assert len(whole.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("optimizer", BOTH)
def test_a_parameter_is_given_once(optimizer: type) -> None:
    p = parameter()
    with pytest.raises(ValueError, match=r"params\[1\] is given twice"):
        optimizer([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer([{"params": [p]}, {"params": [p]}])


@pytest.mark.parametrize("optimizer", BOTH)
def test_strided_indices_work(optimizer: type) -> None:
    p, q = parameter(), parameter()
    for each, index in ((p, torch.tensor([0, 9, 2, 9])[::2]), (q, torch.tensor([0, 2]))):
        o = optimizer([{"params": [each], "indices": [index]}], lr=0.1)
        each.grad = torch.ones(4, 3)
        o.step()
    assert torch.equal(p, q)
    assert (p[0] != 0).all()


@pytest.mark.parametrize("optimizer", BOTH)
@pytest.mark.parametrize("lr", [INF, NAN, -1.0])
def test_a_schedule_cannot_set_a_bad_rate(optimizer: type, lr: float) -> None:
    p = parameter()
    o = optimizer([p], lr=0.1)
    p.grad = torch.ones_like(p)
    o.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="lr is"):
        o.step()
    assert (p == 0).all()
    assert not o.state[p] or o.state[p]["step"] == 0


@pytest.mark.parametrize("optimizer", BOTH)
def test_the_earlier_name_of_a_rounding_warns(optimizer: type) -> None:
    with pytest.warns(DeprecationWarning, match="now rounding='remainder'"):
        o = optimizer([parameter()], rounding="kahan")
    assert o.param_groups[0]["rounding"] == "remainder"


def test_kahan_s_compensation_of_an_earlier_release_is_taken_over() -> None:
    """A sum of two bfloat16 numbers becomes the two halves of a float32 weight."""
    p = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.bfloat16))
    o = MaskedAdamW([p], lr=0.0, weight_decay=0.0, rounding="remainder")
    p.grad = torch.ones_like(p)
    o.step()
    saved = o.state_dict()
    kahan = torch.tensor([[0.001, 0.003, -0.0004]], dtype=torch.bfloat16)
    saved["state"][0]["compensation"] = kahan
    saved["param_groups"][0]["rounding"] = "kahan"
    o.load_state_dict(saved)
    assert o.param_groups[0]["rounding"] == "remainder"
    rest = o.state[p]["compensation"]
    weight = ((p.detach().view(torch.int16).int() << 16) + rest.int()).view(torch.float32)
    assert torch.equal(weight, p.detach().float() + kahan.float())
