"""What must hold for every family, each against a float64 computation, and the table of it.

`python tests/family_checks.py` runs every check and writes docs/families.md.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import tiny_models
import torch
from test_attribution import assert_close, capture, expected, ragged
from test_training import assert_equal, batch, draw, loss_of, make, masks, snapshot
from torch import Tensor

from ssah import families
from ssah.ablation import ablate
from ssah.attribution import METRICS, attribute
from ssah.provenance import write_whole

TABLE = Path(__file__).parents[1] / "docs" / "families.md"


def check_scores(family: str) -> None:
    """Every metric, from activations captured by plain hooks."""
    model = tiny_models.build(family)
    captured = [capture(model, part, gradient=True) for part in ragged()]
    for metric in METRICS:
        result = attribute(model, ragged(), metric=metric)
        assert (result.metric, result.tokens) == (metric, "labels")
        assert_close(result, *expected(model, ragged(), metric, "labels", captured), 1e-4)


def check_ablation(family: str) -> None:
    """Ablated units are the channels that a hook keeps from entering B."""
    model = tiny_models.build(family, dtype=torch.float64)
    dense, before, units = copy.deepcopy(model), snapshot(model), draw(model)
    for name in units:
        kept = (~units.mask(name)).double()
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kept=kept: (args[0] * kept,)
        )
    with torch.no_grad():
        whole, without = model(**batch()).logits, dense(**batch()).logits
        with ablate(model, units):
            torch.testing.assert_close(model(**batch()).logits, without, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(whole, without, rtol=1e-3)
    assert_equal(snapshot(model), before)


def check_training(family: str, mode: str) -> None:
    """Same function, same gradients, and what is frozen does not move by a bit."""
    model = tiny_models.build(family, dtype=torch.float64)
    dense = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    before, units = snapshot(model), draw(model)
    trains = masks(model, units, mode)
    plan = make(model, mode, units)
    assert_equal(snapshot(model), before)
    torch.testing.assert_close(
        model(**batch()).logits, dense(**batch()).logits, rtol=1e-6, atol=1e-6
    )
    loss_of(model).backward()
    loss_of(dense).backward()
    own = dict(dense.named_parameters())
    trained = 0
    for name, parameter, entries, _ in plan.trained_slices():
        gradient = own[name].grad
        assert gradient is not None, name
        if name.rpartition(".")[0] in plan.masked and name not in dict(model.named_parameters()):
            dim = plan.entries[name].dim
            gradient = gradient.index_select(dim, entries)
            gradient = gradient.t() if dim == 1 else gradient
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
        trained += parameter.numel()
    assert trained == sum(int(mask.sum()) for mask in trains.values())
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)

    optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-2, weight_decay=0.5)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    plan.verify()
    after = snapshot(model)
    plan.close()
    assert_equal(snapshot(model), after)
    assert [type(module) for module in model.modules()] == classes
    assert_only_moved(trains, before, after)


def assert_only_moved(
    trains: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]
) -> None:
    """Every tensor of which something trains moved, and only there."""
    for name, mask in trains.items():
        moved = after[name] != before[name]
        assert not bool((moved & (mask == 0)).any()), name
        if mask.any():
            assert bool((moved & (mask == 1)).any()), name


# Column of the table -> what must hold for a family's tiny model; one that held is not run again.
CHECKS: dict[str, Callable[[str], None]] = {
    "score": functools.cache(check_scores),
    "ablate": functools.cache(check_ablation),
    "freeze": functools.cache(functools.partial(check_training, mode="freeze")),
    "train_only": functools.cache(functools.partial(check_training, mode="train_only")),
}


def model_type(family: str) -> str:
    """The entry of `ssah.families.FAMILIES` that a tiny model belongs to."""
    return str(tiny_models.FAMILIES[family]().model_type)


def table() -> str:
    """docs/families.md: what holds for every architecture, and what is not covered."""
    dense = (name for name, family in families.FAMILIES.items() if family.experts is None)
    members: dict[str, list[str]] = {name: [] for name in sorted(dense)}
    for family in tiny_models.FAMILIES:
        members[model_type(family)].append(family)
    lines = [
        _HEAD,
        f"| `model_type` | {' | '.join(CHECKS)} |",
        "|---|" + "---|" * len(CHECKS),
    ]
    for name, own in members.items():
        cells = ["yes" if own and all(_holds(f, check) for f in own) else "no" for check in CHECKS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines.append(_NOT_COVERED)
    for name in members:
        for part in families.FAMILIES[name].not_covered:
            lines.append(f"| `{name}` | `{part.at}` | {part.instead or ''} | {part.reason} |")
    for name, reason in families.WITHOUT_MODULES.items():
        lines.append(f"| `{name}` | everything | | {reason} |")
    return "\n".join(lines) + "\n"


def _holds(family: str, check: str) -> bool:
    try:
        CHECKS[check](family)
    except AssertionError:
        return False
    return True


_HEAD = """\
# Families

Which architectures are covered, by `config.model_type` (of a model that also sees or hears: that of
its text part). `ssah info --model ID` says it of one model, from its configuration alone. To add
one, describe it: `ssah.register_family`.

A cell says "yes" where a check on tiny random models held: scores under every metric, beside those
computed in float64 from activations captured by hooks; ablation, in float64, beside hooks that keep
the units' channels from passing; gradients under `freeze` and `train_only`, in float64, beside
those of the whole model, while what is frozen stays the same bit for bit. This page is written by
`python tests/family_checks.py`, and a test fails where it is out of date. Mixtures of experts have
[a page of their own](experts.md).
"""
_NOT_COVERED = """
## What holds no units

Such a part runs as ever; it trains under `freeze` and does not under `train_only`, like everything
that belongs to no unit.

| `model_type` | part of a layer | in place of | why |
|---|---|---|---|"""

if __name__ == "__main__":
    write_whole(TABLE, table().encode())
