"""Train chosen neurons of a plain PyTorch model, with ``torch.ops.ssah`` alone.

No transformers, no optimiser class: a two-layer network of which only some hidden units may move.
A unit owns a row of the first weight, an entry of its bias, and a column of the second weight.
Everything else, the second bias included, stays bit for bit what it was.

    python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssah_kernels.registration  # noqa: F401  (defines torch.ops.ssah)

STEPS, HIDDEN = 60, 64


def train(model: nn.Sequential, units: Tensor, x: Tensor, y: Tensor) -> tuple[list[float], Tensor]:
    """Fit y = model(x) by moving only ``units`` (int64, increasing) of the hidden layer.

    Returns:
        The loss at every step, and each unit's importance: its sum of (weight * gradient)^2.
    """
    first, second = model[0], model[2]
    params = [first.weight, first.bias, second.weight]
    dims = [0, 0, 1]  # units run over rows, entries, columns
    compact = [p.detach().index_select(d, units) for p, d in zip(params, dims, strict=True)]
    exp_avgs = [torch.zeros_like(c) for c in compact]
    exp_avg_sqs = [torch.zeros_like(c) for c in compact]
    signed, squared = ([torch.zeros(len(units)).double() for _ in params] for _ in range(2))
    indices = [units] * len(params)
    lr, step = torch.tensor(1e-2), torch.tensor(0.0)

    losses = []
    for _ in range(STEPS):
        loss = (model(x) - y).square().mean()
        grads = torch.autograd.grad(loss, params)
        compact_grads = [g.index_select(d, units) for g, d in zip(grads, dims, strict=True)]
        norm = torch.ops.ssah.masked_grad_norm(compact_grads, [None] * len(params), dims)
        clip_coef = (1.0 / (norm + 1e-6)).clamp(max=1)
        step += 1
        torch.ops.ssah.masked_adamw_(
            [p.detach() for p in params],
            compact_grads,
            exp_avgs,
            exp_avg_sqs,
            indices,
            dims,
            lr,
            step,
            clip_coef=clip_coef,
            signed=signed,
            squared=squared,
            weight_decay=0.01,
        )
        losses.append(loss.item())
    return losses, torch.stack(squared).sum(0)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 4))
    units = torch.randperm(HIDDEN)[: HIDDEN // 4].sort().values
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(256, 16)
    losses, importance = train(model, units, x, torch.sin(x[:, :4]))

    frozen = torch.ones(HIDDEN, dtype=torch.bool)
    frozen[units] = False
    after = dict(model.named_parameters())
    assert torch.equal(after["0.weight"][frozen], before["0.weight"][frozen])
    assert torch.equal(after["0.bias"][frozen], before["0.bias"][frozen])
    assert torch.equal(after["2.weight"][:, frozen], before["2.weight"][:, frozen])
    assert torch.equal(after["2.bias"], before["2.bias"])
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {len(units)} of {HIDDEN} units trained")
    print(f"most important unit: {int(units[importance.argmax()])}; frozen weights unchanged")


if __name__ == "__main__":
    main()
