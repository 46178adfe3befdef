"""What must hold for every family, each against a float64 computation, and the table of it.

`python tests/helpers/family_checks.py` runs every check and writes docs/families.md. With names of
tiny models after it, it checks those alone, and writes the same page.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ranks
import streamed
import tiny_models
import torch
from family_ranks import BATCHES, OPTIONS, results_of_two, tiny
from in_float64 import InFloat64
from mixtures import Capture, keep_out
from plans import assert_equal, batch, draw, loss_of, make, masks, snapshot
from scores import assert_close, capture, expected, ragged
from torch import Tensor, nn

from ssah.attribution import METRICS, attribute, stream
from ssah.attribution.streaming.run import STREAMED_METRICS
from ssah.interventions import ablate
from ssah.storage import write_whole
from ssah.units import families

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
TINY = {**tiny_models.FAMILIES, **tiny_models.EXPERTS}


def check_scores(family: str) -> None:
    """Every metric, from activations captured by plain hooks; of experts, also of all tokens."""
    if family in tiny_models.EXPERTS:
        model = tiny_models.build(family, dtype=torch.float64)
        captured = Capture(model, ragged())
        for metric in METRICS:
            result = attribute(model, ragged(), metric=metric)
            captured.check(result)
            assert max(score.max() for name, score in result.scores.items() if "[" in name) > 0
        for metric in STREAMED_METRICS:
            captured.check(attribute(model, ragged(), metric=metric, all_experts=True))
        return
    model = tiny_models.build(family)
    seen = [capture(model, part, gradient=True) for part in ragged()]
    for metric in METRICS:
        result = attribute(model, ragged(), metric=metric)
        assert (result.metric, result.tokens) == (metric, "labels")
        assert_close(result, *expected(model, ragged(), metric, "labels", seen), 1e-4)


def check_ablation(family: str) -> None:
    """Ablated units are the channels that are kept from entering B."""
    model = tiny(family)
    dense, before, units = copy.deepcopy(model), snapshot(model), draw(model)
    keep_out(dense, units)
    with torch.no_grad(), InFloat64():
        whole, without = model(**batch()).logits, dense(**batch()).logits
        with ablate(model, units):
            torch.testing.assert_close(model(**batch()).logits, without, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(whole, without, rtol=1e-3)
    assert_equal(snapshot(model), before)


def check_training(family: str, mode: str) -> None:
    """Same function, same gradients, and what is frozen does not move by a bit."""
    model = tiny(family)
    dense = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    before, units = snapshot(model), draw(model)
    trains = masks(model, units, mode)
    if mode == "freeze":  # a router's correction, which never has a gradient, stays as well
        still = (name for name, p in model.named_parameters() if not p.requires_grad)
        trains |= {name: torch.zeros_like(trains[name]) for name in still}
    plan = make(model, mode, units)
    assert_equal(snapshot(model), before)
    with InFloat64():
        torch.testing.assert_close(
            model(**batch()).logits, dense(**batch()).logits, rtol=1e-9, atol=1e-9
        )
        loss_of(model).backward()
        loss_of(dense).backward()
    own = dict(dense.named_parameters())
    trained = 0
    for name, parameter, entries, _ in plan.trained_slices():
        gradient = own[name].grad
        trained += parameter.numel()
        if gradient is None:
            assert parameter.grad is None, name
            continue
        if name.rpartition(".")[0] in plan.masked and name not in dict(model.named_parameters()):
            dims = plan.entries[name].dims
            rows = gradient.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
            gradient = rows[entries]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
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
    assert_only_moved(reached(trains, dense), before, after)


def check_streaming(family: str) -> None:
    """Scores of files have the bits of those of the model in memory; every byte is read once."""
    data = streamed.batches()
    with TemporaryDirectory() as folder:
        streamed.saved(Path(folder), family)
        result, traffic = stream(folder, data)
        streamed.assert_same(result, streamed.in_memory(folder, data))
    assert traffic.bytes_read == traffic.bytes_needed


def check_sharding(family: str) -> None:
    """Two processes that hold a half of every weight score and train what one process does."""
    scores, states = results_of_two(family, SHARDED if family in SHARDED else OTHERS)
    model = tiny(family)
    ranks.assert_close(scores, attribute(model, ranks.batches(BATCHES)), 1e-12)
    before = [snapshot(model)] * 2  # of two processes, of one
    for mode, ours in states.items():
        trains = masks(model, draw(model), mode)
        with make(model, mode) as plan:
            with InFloat64():
                ranks.train(model, plan.optimizer(**OPTIONS), range(1))
            trains = reached(trains, model)
        one = snapshot(model)
        for name in ours:
            change, expected_change = ours[name] - before[0][name], one[name] - before[1][name]
            bound = 1e-9 * expected_change.abs().max() + 1e-12
            assert bool(((change - expected_change).abs() <= bound).all()), name
        assert_only_moved(trains, before[0], ours)
        before = [ours, one]


def assert_only_moved(
    trains: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]
) -> None:
    """Every tensor of which something trains moved, and only there."""
    for name, mask in trains.items():
        moved = after[name] != before[name]
        assert not bool((moved & (mask == 0)).any()), name
        if mask.any():
            assert bool((moved & (mask == 1)).any()), name


def reached(trains: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``trains`` without the parameters that no gradient has reached: some only choose experts."""
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    return {n: torch.zeros_like(mask) if n in idle else mask for n, mask in trains.items()}


# Of the chosen tiny models, one of each kind that two processes divide differently: biases, shared
# keys and values, experts, transposed and fused weights, linear attention.
SHARDED = ("llama_bias", "gemma4_experts", "mixtral", "gpt_oss", "gpt2", "phi3", "olmo_hybrid")
OTHERS = tuple(family for family in TINY if family not in SHARDED)
# Column of the table -> what must hold for a family's tiny model.
CHECKS: dict[str, Callable[[str], None]] = {
    "score": check_scores,
    "ablate": check_ablation,
    "freeze": functools.partial(check_training, mode="freeze"),
    "train_only": functools.partial(check_training, mode="train_only"),
    "stream": check_streaming,
    "FSDP2": check_sharding,
}
_SHARED = "layers that take keys and values from earlier ones"
# What the library refuses instead, and the words of its error that say why.
REFUSED = {("gemma3n", "stream"): _SHARED, ("gemma4", "stream"): _SHARED}


def check(family: str, column: str) -> None:
    """See that what the table says of a tiny model is true."""
    reason = REFUSED.get((family, column))
    if reason is None:
        CHECKS[column](family)
        return
    with pytest.raises(ValueError, match=reason):
        CHECKS[column](family)


def model_type(family: str) -> str:
    """The entry of `ssah.units.families.FAMILIES` that a tiny model belongs to."""
    return str(TINY[family]().model_type)


def table() -> str:
    """docs/families.md: what `check` sees of every architecture, and what is not covered."""
    members: dict[str, list[str]] = {}
    for family in TINY:
        members.setdefault(model_type(family), []).append(family)
    lines = [_HEAD, _row("`model_type`", CHECKS), "|---" * (1 + len(CHECKS)) + "|"]
    for name, own in sorted(members.items()):
        # Of several tiny models some may be refused: "yes" comes last, so that it reads on.
        refused = [[REFUSED.get((family, column)) for family in own] for column in CHECKS]
        said = [sorted({f"no: {why}" if why else "yes" for why in column}) for column in refused]
        lines.append(_row(f"`{name}`", ["; else ".join(each) for each in said]))
    lines.append(_NOT_COVERED)
    for name in sorted(members):
        for part in families.FAMILIES[name].not_covered:
            lines.append(f"| `{name}` | `{part.at}` | {part.instead or ''} | {part.reason} |")
    for name, reason in families.WITHOUT_MODULES.items():
        lines.append(f"| `{name}` | everything | | {reason} |")
    return "\n".join(lines) + "\n"


def _row(name: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


_HEAD = """\
# Families

Which architectures are covered, and what works with each of them.

```bash
ssah info --model Qwen/Qwen3-0.6B
```

This command says it of one model, from its configuration alone. The table goes by
`config.model_type`. For a model that also sees or hears, it is the `model_type` of its text part.
To add an architecture, describe it with `ssah.register_family`. Mixtures of experts have
[a page of their own](experts.md).

"yes" means that a check on tiny random models of this family holds. What each check compares:

* **score**: every metric with a float64 computation, from activations that hooks captured. Routed
  experts are also checked with `all_experts=True`.
* **ablate**: the ablated model with one that keeps the units' channels from passing, in float64.
* **freeze**, **train_only**: gradients with those of the whole model, in float64. What is frozen
  keeps every bit.
* **stream**: scores with those of the model in memory. The bits are the same.
* **FSDP2**: two processes, each with half of every weight, with one process. Scores agree to 1e-12,
  and a step of `freeze` and of `train_only` to 1e-9 of the largest change. What is frozen keeps
  every bit.

"no: ..." quotes the error that ssah raises. "else yes" means that other configurations of the same
family work. `python tests/helpers/family_checks.py` writes this page, and a test fails where it is
out of date.
"""
_NOT_COVERED = """
## Parts that hold no units

Such a part runs as always. Like everything that belongs to no unit, it trains under `freeze` and
does not train under `train_only`.

| `model_type` | part of a layer | in place of | why |
|---|---|---|---|"""

if __name__ == "__main__":
    for each in sys.argv[1:] or TINY:
        if each not in TINY:
            sys.exit(f"{each!r} is no tiny model; those of tests/helpers/tiny_models.py: {[*TINY]}")
        for column in CHECKS:
            check(each, column)
    write_whole(TABLE, table().encode())
