"""Input gradients of a batch equal those of each prompt by itself, given as embeddings."""

from __future__ import annotations

import pytest
import torch
from ablatable import assert_same_bits, bits
from tiny_models import build, collate, rows

from ssah.evaluation import input_gradient_norms

LENGTHS = (9, 5, 7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_norms_are_those_of_each_prompt(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before, data = bits(model), rows(LENGTHS)
    expected = []
    for ids, labels in data:
        prompt = ids[: int((labels == -100).sum())]
        e = model.get_input_embeddings()(prompt[None]).detach().requires_grad_()
        y = model(inputs_embeds=e).logits[0, -1].max()
        (gradient,) = torch.autograd.grad(y, e)
        expected.append(sum(float(x) ** 2 for x in gradient.flatten()) ** 0.5)
    prompts = [(ids[labels == -100], labels[labels == -100]) for ids, labels in data]
    for loader in (
        [collate(data[:2], side="left"), collate(data[2:])],
        [collate(prompts, labels=False, side="left")],
        [collate(prompts[:1], labels=False), collate(prompts[1:], labels=False)],
    ):
        found = input_gradient_norms(model, loader)
        assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert_same_bits(model, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_has_no_gradient_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="loader is empty"):
        input_gradient_norms(model, [])
    silent = collate(rows((9,)))
    silent["labels"][:] = -100
    with pytest.raises(ValueError, match="batch 0 has a row without a response token"):
        input_gradient_norms(model, [silent])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        input_gradient_norms(model, [collate(rows((9,)))])
