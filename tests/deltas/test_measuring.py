"""How large a delta is and where it lies, against loops over units and draws."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from plans import draw
from torch import Tensor
from transformers import PreTrainedModel
from tuned import FAMILIES, pair, saved

from ssah import deltas
from ssah.units import UnitSet, find_modules


def squares(base: PreTrainedModel, tuned: PreTrainedModel) -> dict[str, Tensor]:
    after = dict(tuned.named_parameters())
    return {
        n: (after[n].double() - p.double()).square().detach() for n, p in base.named_parameters()
    }


def energy_by_hand(model: PreTrainedModel, of: dict[str, Tensor]) -> dict[str, list[float]]:
    """B's name -> what each unit owns of ``of``; who shares a row of V has an equal part of it."""
    owners: dict[tuple[str, int | None, int, int], list[tuple[str, int]]] = {}
    modules = find_modules(model)
    for name, module in modules.items():
        for owned in (*module.inputs, module.output):
            for unit, entry in enumerate(owned.index.tolist()):
                place = (owned.param, owned.expert, owned.dim, entry)
                owners.setdefault(place, []).append((name, unit))
    found = {name: [0.0] * module.n_units for name, module in modules.items()}
    for (param, expert, dim, entry), own in owners.items():
        values = of[param] if expert is None else of[param][expert]
        for name, unit in own:
            found[name][unit] += float(values.select(dim, entry).sum()) / len(own)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_have_what_their_units_own(name: str, tmp_path: Path) -> None:
    base, tuned = pair(name)
    units = {"scu": draw(base, 0.05), "ru": draw(base, 0.5, seed=1)}
    of = squares(base, tuned)
    total = sum(float(each.sum()) for each in of.values())
    n = sum(each.numel() for each in of.values())
    energy = energy_by_hand(base, of)
    counts = energy_by_hand(base, {param: torch.ones_like(each) for param, each in of.items()})
    found = deltas.measure(base, tuned, units)
    for group, own in units.items():
        size = found.groups[group]
        pairs = [(module, j) for module, index in own.items() for j in index.tolist()]
        assert size.units == len(pairs)
        assert size.share == pytest.approx(sum(energy[m][j] for m, j in pairs) / total)
        assert size.parameters == pytest.approx(sum(counts[m][j] for m, j in pairs) / n)
    rest = 1 - sum(map(sum, energy.values())) / total
    assert found.groups["no unit"].share == pytest.approx(rest)
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned", "20KB")
    again = deltas.measure(*folders, units)
    for group, size in found.groups.items():
        assert asdict(again.groups[group]) == pytest.approx(asdict(size))
    for layer, parts in found.layers.items():
        assert list(again.layers[layer]) == list(parts)
        for part, own_size in parts.items():
            assert asdict(again.layers[layer][part]) == pytest.approx(asdict(own_size))


def test_random_units_are_the_control_that_draws_would_give() -> None:
    base, tuned = pair("llama_tied")
    with torch.no_grad():  # a delta that lies in few units
        tuned.get_parameter("model.layers.0.mlp.down_proj.weight")[:, :5] += 3
    units = draw(base, 0.2)
    of = squares(base, tuned)
    energy, total = energy_by_hand(base, of), sum(float(each.sum()) for each in of.values())
    shares = torch.tensor(
        [
            sum(
                energy[name][j]
                for name, index in UnitSet.random(units, seed=seed).items()
                for j in index.tolist()
            )
            / total
            for seed in range(400)
        ],
        dtype=torch.float64,
    )
    size = deltas.measure(base, tuned, {"scu": units}).groups["scu"]
    assert abs(float(shares.mean()) - size.random) < 4 * size.random_sd / 20
    assert float(shares.std()) == pytest.approx(size.random_sd, rel=0.15)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"embedding", "attention", "mlp", "norm", "head"}),
        ("llama_tied", {"embedding", "attention", "mlp", "norm"}),
        ("gpt2", {"embedding", "attention", "mlp", "norm", "other"}),  # positions
        ("mixtral", {"embedding", "attention", "mlp", "norm", "head"}),
        ("opt", {"embedding", "attention", "mlp", "norm", "other"}),
    ],
)
def test_parts_add_up_to_the_whole(name: str, expected: set[str]) -> None:
    base, tuned = pair(name)
    found = deltas.measure(base, tuned)
    assert set(found.parts) == expected
    assert not found.groups
    assert sum(size.parameters for size in found.parts.values()) == base.num_parameters()
    of = squares(base, tuned)
    assert found.total.norm**2 == pytest.approx(sum(float(each.sum()) for each in of.values()))
    assert found.total.changed == sum(int((each != 0).sum()) for each in of.values())
    attention = [key for key in of if "attn" in key and "norm" not in key and "ln_" not in key]
    own = sum(float(of[key].sum()) for key in attention)
    assert found.parts["attention"].delta_sq == pytest.approx(own)
    bases = sum(float(base.state_dict()[key].double().square().sum()) for key in attention)
    assert found.parts["attention"].relative == pytest.approx((own / bases) ** 0.5)
    assert sorted(found.layers) == [0, 1]


def test_what_did_not_change_is_nought() -> None:
    base, _ = pair("llama")
    found = deltas.measure(base, base, {"scu": draw(base)})
    assert (found.total.norm, found.total.changed, found.groups["scu"].share) == (0, 0, 0)
    with pytest.raises(ValueError, match="units has modules that the model"):
        deltas.measure(base, base, {"scu": draw(pair("gpt2")[0])})
    with pytest.raises(TypeError, match="is a state dict"):
        deltas.measure(base.state_dict(), base.state_dict())
