"""What a step of the optimisers counts."""

from __future__ import annotations

import pytest
import torch

from ssah_kernels.optim import MaskedAdamW, MaskedSGD


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
