"""What a training step takes is estimated without training."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import Tensor

from ssah.training import freeze, train_only
from ssah.training.finetune import Settings, optimizer_options, preview
from ssah.units import UnitSet, find_modules


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_activations_are_extrapolated_exactly(family: str) -> None:
    model = tiny_models.build(family)
    units = UnitSet.random(60, {n: m.n_units for n, m in find_modules(model).items()})
    plan = train_only(model, units)
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for module in plan.masked.values():
        own |= {split.storage.data_ptr() for split in module.split_tensors.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(6, 40, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    gradients = 2 * output.logits.numel() * 4
    memory = preview(plan, Settings(batch_size=6), 40)["memory"]
    assert memory["activations"] == pytest.approx(sum(kept.values()) + gradients, rel=0.02)
    less = preview(plan, Settings(batch_size=6, gradient_checkpointing=True), 40)["memory"]
    assert less["activations"] < memory["activations"]
    assert less["weights"] == memory["weights"] >= 4 * plan.n_parameters


def test_state_is_counted_as_it_is_stored() -> None:
    """The tiny model has rows of 48 and of 72, of which the latter are in 8 bits."""
    model = tiny_models.build("llama", dtype=torch.bfloat16)
    expected = {}
    units = UnitSet({}, {n: m.n_units for n, m in find_modules(model).items()})
    with freeze(model, units) as plan:
        for state_dtype in ("float32", "bfloat16", "8bit"):
            settings = Settings(state_dtype=state_dtype)
            memory = preview(plan, settings, 20)["memory"]
            optimizer = plan.optimizer(**optimizer_options(plan, settings))
            for p in plan.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            states = [t for s in optimizer.state.values() for n, t in s.items() if n != "step"]
            expected[state_dtype] = sum(t.nbytes for t in states)
            assert memory["optimizer_state"] == expected[state_dtype]
    assert any(t.dtype == torch.uint8 for t in states)
    assert expected["float32"] == 2 * expected["bfloat16"]
    assert expected["8bit"] < expected["float32"]
