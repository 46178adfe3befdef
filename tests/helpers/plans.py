"""Plans over tiny models: which units they have, and which elements must train."""

from __future__ import annotations

import tiny_models
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.training import UpdatePlan, freeze, train_only
from ssah.units import UnitSet, find_modules


def batch(seed: int = 0) -> dict[str, Tensor]:
    return tiny_models.collate(tiny_models.rows((9, 9, 9), seed=seed))


def draw(model: PreTrainedModel, fraction: float = 0.3, seed: int = 0) -> UnitSet:
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    return UnitSet.random(round(fraction * sum(sizes.values())), sizes, seed)


def make(model: PreTrainedModel, mode: str, units: UnitSet | None = None) -> UpdatePlan:
    units = draw(model) if units is None else units
    return freeze(model, units) if mode == "freeze" else train_only(model, units)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return loss_on(model, batch(seed))


def loss_on(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean loss in nats over the labels, in float64."""
    logits = model(**inputs).logits[:, :-1].double()
    return nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def masks(model: PreTrainedModel, units: UnitSet, mode: str) -> dict[str, Tensor]:
    """Which elements train, from the definition, with loops; float64 of each parameter's shape."""
    keep = mode == "freeze"
    result = {name: torch.full_like(p, float(keep)) for name, p in model.named_parameters()}
    for name, module in find_modules(model).items():
        chosen = set(units[name].tolist())
        for owned in (*module.inputs, module.output):
            mask = result[owned.param]
            mask = mask if owned.expert is None else mask[owned.expert]
            mask = mask.movedim(owned.dim, 0)
            owners: dict[int, list[int]] = {}
            for unit, entry in enumerate(owned.index.tolist()):
                owners.setdefault(entry, []).append(unit)
            for entry, own in owners.items():
                mask[entry] = float(all((unit in chosen) != keep for unit in own))
    return result


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def in_plan_order(
    plan: UpdatePlan, tensors: dict[str, Tensor], *, back: bool = False
) -> dict[str, Tensor]:
    """``tensors`` by the names of a model's parameters, FFN channels in the order of ``plan``.

    Args:
        back: from that order to the model's own.
    """
    result = dict(tensors)
    for owner, module in plan.masked.items():
        for leaf, slot in module.split_tensors.items():
            name = f"{owner}.{leaf}"
            if module.moves_channels and name in result and result[name].dim():
                order = slot.order.argsort() if back else slot.order
                result[name] = result[name].index_select(slot.dims[0], order)
    return result


def train(plan: UpdatePlan, steps: int = 3) -> None:
    """With weight decay, momentum and gradients left to whatever is trained."""
    optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(plan.model, seed).backward()
        optimizer.step()


def check_moved(model: nn.Module, before: dict[str, Tensor], trains: dict[str, Tensor]) -> None:
    """What does not train has every bit; something of what does has moved."""
    for name, mask in trains.items():
        now, old = model.state_dict()[name], before[name]
        assert torch.equal(now[mask == 0], old[mask == 0]), name
        assert torch.equal(now, old) != bool(mask.any()), name
