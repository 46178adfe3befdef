"""What is done with a selection: it trains, stays, is changed for a while, put back, left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from plans import assert_equal, batch, draw, loss_of, masks, snapshot
from torch import Tensor, nn
from transformers import PreTrainedModel
from tuned import assert_same_state, loaded, pair, saved

import ssah
from ssah import deltas, selections
from ssah.interventions import Replace, Scale, Zero
from ssah.selections import Selection
from ssah.units import BitMask, UnitSet, find_modules

FAMILIES = ["llama_tied", "llama_bias", "gpt2", "gemma3", "mixtral"]
PREFIX = {"gpt2": "transformer.h"}
NORM = {"gpt2": "transformer.ln_f.*"}


def mixed(model: PreTrainedModel, family: str) -> tuple[Selection, dict[str, Tensor]]:
    """Layer 0, two heads of layer 1, the last norm, two tokens; and the same mask by mask."""
    prefix, norm = PREFIX.get(family, "model.layers"), NORM.get(family, "model.norm.*")
    embedding = next(name for name, _ in model.named_parameters())  # tied to the head or not
    chosen = ssah.select(model, f"layers:0 + heads:1.2-3 + parameters:{norm}")
    chosen = chosen | selections.rows(model, {embedding: [5, 7]})
    found = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    for name, mask in found.items():
        if name.startswith((f"{prefix}.0.", norm[:-1])):
            mask.fill_(True)
    found[embedding][[5, 7]] = True
    n, config = model.config.num_attention_heads, model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // n
    queries, keys = slice(2 * width, 4 * width), slice(width, 2 * width)  # two share one
    if family == "gpt2":
        for part in range(3):
            own = slice((part * n + 2) * width, (part * n + 4) * width)
            found[f"{prefix}.1.attn.c_attn.weight"][:, own] = True
            found[f"{prefix}.1.attn.c_attn.bias"][own] = True
        found[f"{prefix}.1.attn.c_proj.weight"][queries] = True
        return chosen, found
    start = f"{prefix}.1.self_attn"
    found[f"{start}.q_proj.weight"][queries] = True
    found[f"{start}.k_proj.weight"][keys] = True
    found[f"{start}.v_proj.weight"][keys] = True
    if family == "llama_bias":
        for name, own in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            found[f"{start}.{name}.bias"][own] = True
    found[f"{start}.o_proj.weight"][:, queries] = True
    return chosen, found


def train(model: nn.Module, plan: Any, steps: int = 4) -> None:
    optimizer = plan.optimizer(lr=1e-3, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_a_mixed_selection_stays_or_trains(family: str, mode: str) -> None:
    model = tiny_models.build(family)
    chosen, expected = mixed(model, family)
    start = snapshot(model)
    with ssah.freeze(model, chosen) if mode == "freeze" else ssah.train_only(model, chosen) as plan:
        train(model, plan)
        plan.verify()
        assert plan.selection == chosen
    after = model.state_dict()
    for name, mask in expected.items():
        trains = ~mask if mode == "freeze" else mask
        assert torch.equal(after[name][~trains], start[name][~trains]), name
        assert not trains.any() or not torch.equal(after[name][trains], start[name][trains]), name


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_units_as_a_selection_are_the_same_plan(family: str) -> None:
    """By "any" what `freeze` keeps, by "all" what `train_only` trains, to the same fingerprint."""
    model = tiny_models.build(family)
    units = draw(model)
    for make, shared in ((ssah.freeze, "any"), (ssah.train_only, "all")):
        with make(model, units) as plan:
            expected, trained = plan.fingerprint, plan.trained_units
        with make(model, ssah.select(model, units, shared=shared)) as plan:  # type: ignore[arg-type]
            assert plan.fingerprint == expected
            assert plan.trained_units == trained
            assert plan.units == units
    # And mask by mask, as loops over units have it.
    chosen = ssah.select(model, units, shared="any")
    for name, trains in masks(model, units, "freeze").items():
        assert torch.equal(~chosen.mask(name).expand_as(trains), trains.bool()), name


def test_a_part_of_units_trains_where_it_can() -> None:
    """Rows of gate alone: they do not lie side by side with what trains of up and down."""
    model = tiny_models.build("llama", dtype=torch.float64)
    gate = "model.layers.0.mlp.gate_proj.weight"
    units = UnitSet({"model.layers.0.mlp.down_proj": [3, 9, 40]}, _sizes(model))
    chosen = selections.rows(model, {gate: [1, 5, 40]}) | units
    start, plain = snapshot(model), copy.deepcopy(model)
    loss_of(plain).backward()
    with ssah.train_only(model, chosen) as plan:
        loss_of(model).backward()
        for name, parameter, index, _ in plan.trained_slices():
            dim = 1 if "down_proj" in name else 0
            expected = plain.get_parameter(name).grad.movedim(dim, 0)[index]  # type: ignore[union-attr]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
        train(model, plan, 2)
        plan.verify()
    moved = (model.get_parameter(gate) != start[gate]).any(1)
    assert moved.nonzero()[:, 0].tolist() == [1, 3, 5, 9, 40]


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    return {name: module.n_units for name, module in find_modules(model).items()}


def _bits(model: PreTrainedModel, name: str, seed: int = 0) -> tuple[Selection, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(model.get_parameter(name).shape, generator=generator) < 0.3
    return selections.weights(model, {name: BitMask.of(mask)}), mask


def test_a_plan_that_keeps_everything_is_refused_and_nothing_changed() -> None:
    model = tiny_models.build("llama")
    start = snapshot(model)
    with pytest.raises(ValueError, match="leave nothing to train"):
        ssah.freeze(model, selections.parameters(model, ["*"]))
    assert_equal(snapshot(model), start)
    with ssah.freeze(model, selections.layers(model, [0])):
        pass  # no plan was left behind


def test_rows_of_b_and_of_norms_train_one_by_one() -> None:
    model = tiny_models.build("llama")
    start = snapshot(model)
    rows = {"model.layers.0.mlp.down_proj.weight": [3], "model.norm.weight": [1, 4]}
    with ssah.train_only(model, selections.rows(model, rows)) as plan:
        train(model, plan, 3)
        plan.verify()
    for name, value in snapshot(model).items():
        moved = (value != start[name]).nonzero()[:, 0].unique().tolist()
        assert moved == rows.get(name, []), name


def test_a_part_of_an_expert_is_refused() -> None:
    model = tiny_models.build("mixtral")
    units = draw(model, 0.3)
    owned = ssah.select(model, units)
    down = selections.parameters(model, ["*experts.down_proj"])
    router = selections.parameters(model, ["*experts.gate_up_proj"])
    other = ssah.select(model, UnitSet.random(units, seed=8))
    with pytest.raises(ValueError, match="must have whole units: rows of gate and up"):
        ssah.train_only(model, (owned - down) | (other & down) | (owned & ~router))


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_change_every_entry_and_put_it_back(family: str) -> None:
    model, other = pair(family)
    chosen, expected = mixed(model, family)
    start, values = snapshot(model), other.state_dict()
    for change, make in (
        (Zero(chosen), lambda name: torch.zeros_like(start[name])),
        (Scale(chosen, -0.5), lambda name: start[name] * -0.5),
        (Replace(chosen, values), lambda name: values[name]),
    ):
        with ssah.intervene(model, change):
            for name, mask in expected.items():
                now = torch.where(mask, make(name), start[name])
                assert torch.equal(model.get_parameter(name), now), name
            with ssah.ablate(model, chosen), ssah.intervene(model, Scale(chosen, 2.0)):
                pass
        assert_equal(snapshot(model), start)


def test_single_weights_are_changed_for_a_while() -> None:
    model = tiny_models.build("llama", dtype=torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    chosen, mask = _bits(model, name)
    start = snapshot(model)
    with ssah.ablate(model, chosen):
        now = model.get_parameter(name)
        assert torch.equal(now, torch.where(mask, 0, start[name]))
    assert_equal(snapshot(model), start)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "deepseek_v3"])
def test_an_ablated_layer_adds_nothing(family: str) -> None:
    """Its output is its input, as where a hook puts the input out."""
    model = tiny_models.build(family, dtype=torch.float64)
    start = snapshot(model)
    layer = model.get_submodule(f"{ssah.units.layers_path(model)}.1")

    def unchanged(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        return (h, *output[1:]) if isinstance(output, tuple) else h

    hook = layer.register_forward_hook(unchanged, with_kwargs=True)
    expected = model(**batch()).logits
    hook.remove()
    chosen = selections.layers(model, [1])
    with ssah.ablate(model, chosen):
        torch.testing.assert_close(model(**batch()).logits, expected, rtol=0, atol=1e-12)
    assert_equal(snapshot(model), start)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selection_is_put_back(family: str, tmp_path: Path) -> None:
    base, tuned = pair(family, torch.bfloat16)
    chosen, masks_of = mixed(base, family)
    units = draw(base, 0.1)
    both = {name: torch.zeros_like(mask) for name, mask in masks_of.items()}
    for name, trains in masks(base, units, "freeze").items():
        both[name] = masks_of[name] | (trains == 0)
    for what, where in ((chosen, masks_of), ([chosen, units], both)):
        expected = dict(tuned.state_dict())
        for name, before in base.named_parameters():
            expected[name] = torch.where(where[name], before, tuned.get_parameter(name))
        if base.config.tie_word_embeddings:
            expected["lm_head.weight"] = expected[next(iter(dict(base.named_parameters())))]
        assert_same_state(deltas.rewind(base, tuned, what), expected)  # type: ignore[arg-type]
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    deltas.rewind(*folders, chosen, out=tmp_path / "out")
    for name, mask in masks_of.items():
        now = torch.where(mask, base.get_parameter(name), tuned.get_parameter(name))
        assert torch.equal(loaded(tmp_path / "out")[name], now), name
    ssah.verify(tmp_path / "out", folders[0], chosen)
    with pytest.raises(RuntimeError, match="are not those of the base"):
        ssah.verify(folders[1], folders[0], chosen)
    # Heads lie in decoder layers alone, which are read one by one.
    heads = ssah.select(base, "heads:1.2-3")
    ssah.verify(tmp_path / "out", folders[0], heads)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("only", [False, True])
def test_adapters_leave_heads_alone(family: str, only: bool) -> None:
    model = tiny_models.build(family)
    before = {name: value.clone() for name, value in model.named_parameters()}
    chosen = selections.heads(model, {0: [1], 1: [2, 3]})
    expected = {name: chosen.mask(name).expand_as(value) for name, value in before.items()}
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    protected = ssah.protect_adapter(adapted, chosen, only=only)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(adapted, step).backward()
        optimizer.step()
    protected.verify()
    after = adapted.merge_and_unload().state_dict()
    moved = 0
    for name, mask in expected.items():
        stays = ~mask if only else mask
        assert torch.equal(after[name][stays], before[name][stays]), name
        moved += int((after[name] != before[name])[~stays].sum())
    assert moved > 500
