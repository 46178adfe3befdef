"""What a plan costs, what it refuses, and that what is frozen is frozen."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, draw, loss_of, snapshot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ssah
from ssah.training import freeze, runs, train_only
from ssah.training.splitting import MaskedProjection
from ssah.units import UnitSet, find_modules

# ------------------------------------------------------------------------------- what it costs


def test_gradients_state_and_activations_exist_for_what_trains_alone() -> None:
    def kept(model: nn.Module) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        own |= {
            slot.storage.untyped_storage().data_ptr()
            for module in model.modules()
            if isinstance(module, MaskedProjection)
            for slot in module.split_tensors.values()
        }
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model).backward()
        return sum(seen.values())

    model = tiny_models.build("llama")
    dense = kept(model)
    plan = train_only(model, draw(model, 0.2))
    assert kept(model) < 0.75 * dense
    trained = [p for p in model.parameters() if p.grad is not None]
    assert {id(p) for p in trained} == {id(p) for p in plan.parameters()}
    optimizer = plan.optimizer()
    optimizer.step()
    elements = sum(p.numel() for p in plan.parameters())
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert state == 2 * elements
    assert elements < 0.2 * plan.n_parameters


def memory(model: nn.Module) -> int:
    """Bytes of all that the model and its plan hold, each stretch of memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, MaskedProjection):
            tensors += [slot.storage for slot in module.split_tensors.values()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("hooked", [False, True])
def test_no_weight_is_copied(hooked: bool) -> None:
    model = tiny_models.build("llama")
    before, n_modules = memory(model), len(find_modules(model))
    if hooked:
        model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    with freeze(model, draw(model)) as plan:
        split = [slot for part in plan.masked.values() for slot in part.split_tensors]
        assert len(split) == 2 * n_modules + n_modules // 2  # an FFN has two matrices for A
        assert memory(model) == before
    assert memory(model) == before


@pytest.mark.parametrize("family", ["llama_bias", "gpt2"])
def test_the_channels_of_heads_stay_where_they_are(family: str) -> None:
    """Hooks on A and B of attention find, under a plan, what they found before it."""
    model = tiny_models.build(family).double()
    seen: list[Tensor] = []
    names = ("v_proj", "o_proj", "attn.c_attn", "attn.c_proj")
    for name, part in model.named_modules():
        if name.endswith(names):
            part.register_forward_hook(lambda _, args, y: seen.extend((args[0], y)))
    loss_of(model)
    n = len(seen)
    with freeze(model, draw(model)), torch.no_grad():
        loss_of(model)
    assert n >= 8  # two layers, two projections, what goes in and what comes out
    assert len(seen) == 2 * n
    for before, under in zip(seen[:n], seen[n:], strict=True):
        torch.testing.assert_close(under, before, rtol=1e-12, atol=1e-12)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.build("llama")
    n_all = sum(p.numel() for p in model.parameters())
    plan = train_only(model, draw(model))
    n_trained = sum(p.numel() for p in plan.parameters())
    plan.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {n_trained:,d} || all params: {n_all:,d} || "
        f"trainable%: {100 * n_trained / n_all:.4f}\n"
    )


# -------------------------------------------------------------------- frozen means frozen


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.0.mlp.up_proj.weight", -1),
        ("model.layers.1.mlp.down_proj.weight", -1),
        ("model.layers.0.self_attn.o_proj.weight", 0),
        ("model.layers.1.mlp.gate_proj.bias", -1),
        ("model.embed_tokens.weight", 3),
        ("model.norm.weight", 5),
    ],
)
def test_verify_sees_a_single_flipped_bit(name: str, row: int) -> None:
    model = tiny_models.build("llama_bias")
    units = draw(model, 0.2)
    plan = train_only(model, units)
    plan.verify()
    owner, _, leaf = name.rpartition(".")
    if owner in plan.masked:
        slot = plan.masked[owner].split_tensors[leaf]
        trained = set(slot.trained_index().tolist())
        order = range(len(slot.storage)) if slot.order is None else slot.order.tolist()
        frozen = [i for i, entry in enumerate(order) if entry not in trained]
        target = slot.storage[frozen[row]]
    else:
        target = model.get_parameter(name).data[row]
    bits = target.reshape(-1)[-1:].view(torch.int32)
    bits ^= 1
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        plan.verify()
    bits ^= 1
    plan.verify()


def test_stale_gradients_and_momentum_move_nothing_frozen() -> None:
    model = tiny_models.build("llama")
    old = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    loss_of(model).backward()
    old.step()
    plan = freeze(model, draw(model))
    with pytest.raises(RuntimeError, match="parameters that the plan has replaced"):
        old.step()
    plan.verify()
    plan.close()
    old.step()  # no plan, no objection


# ------------------------------------------------------------------------------- wrong use


def test_wrong_use_is_refused() -> None:
    model = tiny_models.build("llama")
    units = draw(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match="units is list"):
        freeze(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lacks"):
        freeze(model, draw(tiny_models.build("gpt2")))
    with pytest.raises(ValueError, match="units in"):
        train_only(model, UnitSet({}, dict.fromkeys(units, 5)))
    with pytest.raises(ValueError, match="leave nothing to train"):
        train_only(model, units - units)
    with pytest.raises(ValueError, match=r"extra_parameters has names .* nonsense"):
        train_only(model, units, extra_parameters=["nonsense"])
    with pytest.raises(TypeError, match="collection of parameter names"):
        train_only(model, units, extra_parameters="lm_head.weight")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        freeze(nn.Linear(2, 2), units)  # type: ignore[arg-type]
    assert_equal(snapshot(model), before)
    assert all(p.requires_grad for p in model.parameters())
    plan = train_only(model, units)
    for call in (
        lambda: freeze(model, units),
        lambda: ssah.ablate(model, units),
        lambda: ssah.prune(model, units),
        lambda: ssah.attribute(model, [batch()]),
    ):
        with pytest.raises((ValueError, RuntimeError), match="close it first"):
            call()
    with pytest.raises(RuntimeError, match="no optimiser has stepped"):
        plan.importance()
    plan.optimizer()
    plan.close()


def test_quantised_and_unloaded_bases_are_refused() -> None:
    model = tiny_models.build("llama")
    units = draw(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="meta"):
        freeze(empty, units)
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        freeze(model, units)
    model.is_quantized = False
    weight = model.model.layers[0].mlp.up_proj.weight
    packed = weight.data.to(torch.int8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.*int8"):
        freeze(model, units)


def test_optimiser_state_of_other_units_is_refused() -> None:
    model = tiny_models.build("llama")
    plan = train_only(model, draw(model, seed=1))
    optimizer = plan.optimizer()
    loss_of(model).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    generic = torch.optim.AdamW(plan.param_groups(), lr=1e-3)
    plan.close()
    other = train_only(model, draw(model, seed=2))
    with pytest.raises(ValueError, match="another plan"):
        other.optimizer().load_state_dict(saved)
    loaded = torch.optim.AdamW(other.param_groups(), lr=1e-3)
    loaded.load_state_dict(generic.state_dict())
    loss_of(model).backward()
    with pytest.raises(ValueError, match="another plan"):
        loaded.step()
    other.close()
    again = train_only(model, draw(model, seed=1))
    again.optimizer().load_state_dict(saved)


def test_runs() -> None:
    assert runs(torch.tensor([], dtype=torch.int64)) == []
    assert runs(torch.tensor([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]
