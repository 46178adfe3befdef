"""Attention heads: which weights they have, by gradients; what keeping and ablating them does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, loss_of, snapshot
from torch import Tensor, nn

import ssah
from ssah import selections
from ssah.units import AttentionHeads, find_heads

SOME = ["llama_bias", "gpt2", "gemma3", "mixtral"]
# Fused in two ways, one key/value head for all, a gate beside the query, other names.
MORE = ["gpt_neox", "falcon", "gpt_bigcode", "phi3", "qwen3_next", "opt", "gptj", "stablelm"]


def entering(model: nn.Module, heads: AttentionHeads) -> Tensor:
    """What enters O, ``[rows, tokens, heads, channels]``, in a graph."""
    seen: list[Tensor] = []
    down = model.get_submodule(heads.name)
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch(1))
    hook.remove()
    return seen[0].unflatten(-1, (heads.n_heads, -1))


@pytest.mark.parametrize("family", [*SOME, *MORE])
def test_a_head_has_the_rows_that_its_output_depends_on(family: str) -> None:
    """The gradient of what one head puts out is zero everywhere else in Q, K and V."""
    model = tiny_models.build(family, dtype=torch.float64)
    number, heads = next(reversed(find_heads(model).items()))
    assert heads.n_heads == model.config.num_attention_heads
    for head in range(heads.n_heads):
        model.zero_grad()
        own = entering(model, heads)[:, :, head]
        (own * torch.randn(own.shape, dtype=own.dtype)).sum().backward()
        chosen = selections.heads(model, {number: [head]}, shared="any")
        owners = {owned.param.rpartition(".")[0] for owned in heads.inputs}
        for owner in owners:
            weight = model.get_parameter(f"{owner}.weight")
            assert weight.grad is not None
            depends = weight.grad != 0
            mask = chosen.mask(f"{owner}.weight")
            along = next(dim for dim, size in enumerate(mask.shape) if size == 1)
            assert torch.equal(depends.any(along, keepdim=True), mask), owner
            bias = model.get_submodule(owner).bias
            if bias is not None:  # that of a key has no gradient: it shifts all scores alike
                assert torch.equal(chosen.mask(f"{owner}.bias"), mask.flatten())
        # Of O it is the columns that read these channels.
        param = f"{heads.name}.weight"
        assert chosen.counts[param] * heads.n_heads == model.get_parameter(param).numel()
        assert len(chosen) == sum(chosen.counts.values())


def explicit(model: Any, family: str, layer: int, head: int) -> dict[str, Tensor]:
    """The entries of a head whose keys and values are shared, of each parameter, by slices."""
    config = model.config
    n = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // n
    rows = slice(head * width, (head + 1) * width)
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    if family == "gpt2":
        start = f"transformer.h.{layer}.attn"
        for part in range(3):  # queries, keys, values: columns of a Conv1D
            own = slice(part * n * width + rows.start, part * n * width + rows.stop)
            masks[f"{start}.c_attn.weight"][:, own] = True
            masks[f"{start}.c_attn.bias"][own] = True
        masks[f"{start}.c_proj.weight"][rows] = True
        return masks
    start = f"model.layers.{layer}.self_attn"
    masks[f"{start}.q_proj.weight"][rows] = True
    masks[f"{start}.o_proj.weight"][:, rows] = True
    if f"{start}.q_proj.bias" in masks:
        masks[f"{start}.q_proj.bias"][rows] = True
    return masks


@pytest.mark.parametrize("family", SOME)
def test_masks_are_those_written_by_hand(family: str) -> None:
    model = tiny_models.build(family)
    chosen = selections.heads(model, {1: [2]})
    for name, mask in explicit(model, family, 1, 2).items():
        assert torch.equal(chosen.mask(name).expand_as(mask), mask), name
    if family == "gpt2":  # nothing is shared
        return
    # A whole group has its rows of K and V too.
    group = selections.heads(model, {1: [1]}, kv_heads=True)
    both = selections.heads(model, {1: [2, 3]})
    assert group == both
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for kind in "kv":
        name = f"model.layers.1.self_attn.{kind}_proj.weight"
        assert group.mask(name).flatten().nonzero().flatten().tolist() == [*range(width, 2 * width)]
        assert name not in chosen
        assert selections.heads(model, {1: [2]}, shared="any").mask(name).equal(group.mask(name))


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_heads_stay_or_train_alone(family: str, mode: str, tmp_path: Any) -> None:
    """Twenty steps of AdamW with decay: what must stay has the same bits, the rest moved."""
    model = tiny_models.build(family)
    start, base = snapshot(model), copy.deepcopy(model)
    chosen = selections.heads(model, {1: [2]})
    masks = explicit(model, family, 1, 2)
    plan = ssah.freeze(model, chosen) if mode == "freeze" else ssah.train_only(model, chosen)
    optimizer = plan.optimizer(lr=1e-3, weight_decay=0.1)
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    plan.verify()
    plan.save_pretrained(tmp_path / "update")
    plan.close()
    after = model.state_dict()
    moved = 0
    for name, mask in masks.items():
        stays = mask if mode == "freeze" else ~mask
        assert torch.equal(after[name][stays], start[name][stays]), name
        moved += int((after[name] != start[name])[~stays].sum())
    expected = sum(int(mask.sum()) for mask in masks.values())
    total = sum(p.numel() for p in model.parameters())
    expected = total - expected if mode == "freeze" else expected
    assert moved > 0.8 * expected  # unused tokens have no gradient, and may not decay
    ssah.verify(model, base, chosen, only=mode == "train_only")
    with pytest.raises(RuntimeError, match="are not those of the base model"):
        ssah.verify(model, base, chosen, only=mode == "freeze")
    ssah.load_update(base, tmp_path / "update")
    assert_equal(base.state_dict(), after)


@pytest.mark.parametrize("family", SOME)
def test_a_plan_over_heads_computes_the_same_and_has_the_same_gradients(family: str) -> None:
    model = tiny_models.build(family, dtype=torch.float64)
    plain = copy.deepcopy(model)
    loss_of(plain).backward()
    before = loss_of(model).detach()
    chosen = selections.heads(model, {0: [1], 1: [2, 3]})
    with ssah.train_only(model, chosen) as plan:
        loss = loss_of(model)
        torch.testing.assert_close(loss.detach(), before, rtol=1e-12, atol=1e-12)
        loss.backward()
        trained = 0
        for name, parameter, index, n in plan.trained_slices():
            mask = chosen.mask(name)
            along = next(dim for dim, size in enumerate(mask.shape) if size > 1)
            assert n == mask.numel()
            grad = plain.get_parameter(name).grad
            assert grad is not None
            assert parameter.grad is not None
            expected = grad.movedim(along, 0)[index]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
            trained += parameter.numel()
        assert trained == len(chosen)


@pytest.mark.parametrize("family", SOME)
def test_ablated_heads_put_out_nothing(family: str) -> None:
    """As a hook that sets their channels to zero before they enter O."""
    model = tiny_models.build(family, dtype=torch.float64)
    start = snapshot(model)
    every = find_heads(model)
    out = {0: [1], 1: [0, 3]}

    def without(heads: AttentionHeads, numbers: list[int]) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].unflatten(-1, (heads.n_heads, -1)).clone()
            x[..., numbers, :] = 0
            return (x.flatten(-2),)

        return model.get_submodule(heads.name).register_forward_pre_hook(hook)

    intact = model(**batch()).logits
    hooks = [without(every[layer], numbers) for layer, numbers in out.items()]
    expected = model(**batch()).logits
    for hook in hooks:
        hook.remove()
    assert (expected - intact).abs().max() > 1e-3
    channels = selections.heads(model, out).units
    for layer, numbers in out.items():
        width = len(channels.mask(every[layer].name)) // every[layer].n_heads
        own = [n * width + c for n in numbers for c in range(width)]
        assert channels[every[layer].name].tolist() == own
    assert len(channels) == sum(len(channels[every[layer].name]) for layer in out)
    for shared in ("all", "any"):  # rows of K and V that other heads read are left alone
        with ssah.ablate(model, selections.heads(model, out, shared=shared)):  # type: ignore[arg-type]
            torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-12, atol=1e-12)
            assert_equal(
                {n: v for n, v in model.state_dict().items() if "k_" in n or "q_" in n},
                {n: v for n, v in start.items() if "k_" in n or "q_" in n},
            )
        assert_equal(snapshot(model), start)


def test_families_without_known_heads_refuse_by_name() -> None:
    for family, message in (
        ("deepseek_v3", "family 'deepseek_v3', whose heads cannot be selected: .*latent"),
        ("qwen3_5", "heads are of layer 0, which has none; layers with attention heads are 1"),
    ):
        with pytest.raises(ValueError, match=message):
            selections.heads(tiny_models.build(family), {0: [0]})
