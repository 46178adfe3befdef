"""Hooks of others, and forwards that were replaced, wherever they hang in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plans import batch, draw, loss_of, make
from tiny_models import build
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

import ssah
from ssah.attribution import METRICS
from ssah.units import find_modules

N_ZERO = 10
MLP = "model.layers.0.mlp"


def zeroed(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., :N_ZERO] = 0
    return x


def pre_hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (zeroed(args[0]), *args[1:])


def pre_hook_with_kwargs(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return (zeroed(args[0]), *args[1:]), kwargs


def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
    return zeroed(out)


def hook_with_kwargs(_: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    return zeroed(out)


# What makes the first channels that enter B zero, wherever it hangs in a gated FFN.
HANG: dict[str, Callable[[nn.Module], Any]] = {
    "pre-hook of B": lambda mlp: mlp.down_proj.register_forward_pre_hook(pre_hook),
    "pre-hook of B, prepended": lambda mlp: mlp.down_proj.register_forward_pre_hook(
        pre_hook, prepend=True
    ),
    "pre-hook of B with kwargs": lambda mlp: mlp.down_proj.register_forward_pre_hook(
        pre_hook_with_kwargs, with_kwargs=True
    ),
    "hook of the activation": lambda mlp: mlp.act_fn.register_forward_hook(hook),
    "hook of up": lambda mlp: mlp.up_proj.register_forward_hook(hook),
    "hook of gate with kwargs": lambda mlp: mlp.gate_proj.register_forward_hook(
        hook_with_kwargs, with_kwargs=True
    ),
    "forward of the activation": lambda mlp: setattr(
        mlp.act_fn, "forward", lambda x: zeroed(nn.functional.silu(x))
    ),
}
hang = pytest.mark.parametrize("where", HANG)


def expected(model: PreTrainedModel, metric: str, name: str) -> Tensor:
    """Scores from the definition, of what the model's own forward gives to B. float64."""
    module, seen = model.get_submodule(name), []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].detach().requires_grad_() if not args[0].requires_grad else args[0]
        x.retain_grad()
        seen.append(x)
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(keep)
    inputs = batch()
    logits = model(**inputs).logits[:, :-1]
    nn.functional.cross_entropy(
        logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum"
    ).backward()
    handle.remove()
    model.zero_grad()
    (x,) = seen
    product = (x * x.grad).flatten(0, 1).detach()
    x = x.flatten(0, 1).detach()
    norms = module.weight.detach().square().sum(0)
    scores = {
        "variance": x.var(0) * norms,
        "norm": x.square().mean(0) * norms,
        "taylor": product.sum(0).abs(),
        "fisher": product.square().sum(0),
    }
    return scores[metric]


@hang
@pytest.mark.parametrize("metric", METRICS)
def test_hooks_in_a_gated_ffn_count(where: str, metric: str) -> None:
    model = build("llama").double()
    HANG[where](model.get_submodule(MLP))
    name = f"{MLP}.down_proj"
    scores = ssah.attribute(model, [batch()], metric=metric, tokens="all").scores[name]
    assert float(scores[:N_ZERO].abs().max()) == 0
    torch.testing.assert_close(scores, expected(model, metric, name))


def test_hooks_see_what_the_model_gives_them() -> None:
    """Whole rows, and not the tokens of several rows in pieces."""
    model = build("llama")
    mlp = model.get_submodule(MLP)
    shapes = {}
    for name in ("gate_proj", "up_proj", "act_fn", "down_proj"):
        part = mlp.get_submodule(name)
        part.register_forward_hook(
            lambda _, args, out, name=name: shapes.update({name: tuple(out.shape)})
        )
    ssah.attribute(model, [batch()])
    assert shapes == dict.fromkeys(("gate_proj", "up_proj", "act_fn"), (3, 9, 72)) | {
        "down_proj": (3, 9, 48)
    }


def test_a_global_hook_counts() -> None:
    model = build("llama")

    def global_hook(module: nn.Module, args: Any, out: Any) -> Tensor | None:
        return zeroed(out) if module is model.get_submodule(f"{MLP}.act_fn") else None

    handle = register_module_forward_hook(global_hook)
    try:
        scores = ssah.attribute(model, [batch()]).scores[f"{MLP}.down_proj"]
    finally:
        handle.remove()
    assert float(scores[:N_ZERO].abs().max()) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_a_hook_on_the_activation_of_experts_counts(metric: str) -> None:
    model = build("mixtral")
    plain = ssah.attribute(model, [batch()], metric=metric)
    for name, module in model.named_modules():
        if name.endswith("experts.act_fn"):
            module.register_forward_hook(hook)
    found = ssah.attribute(model, [batch()], metric=metric)
    for name, scores in found.scores.items():
        if "experts" in name:
            assert float(scores[:N_ZERO].abs().max()) == 0
            assert float(scores[N_ZERO:].max()) > 0 or not float(plain.scores[name].max())


@hang
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_hooks_count_under_a_plan(where: str, mode: str) -> None:
    """Loss and gradients are those of the model without a plan: channels stay in their order."""
    model, dense = build("llama").double(), build("llama").double()
    for each in (model, dense):
        HANG[where](each.get_submodule(MLP))
    dense_loss = loss_of(dense)
    dense_loss.backward()
    with make(model, mode) as plan:
        loss = loss_of(model)
        loss.backward()
        torch.testing.assert_close(loss, dense_loss)
        for name, parameter, index, _ in plan.trained_slices():
            if name.startswith(MLP):
                whole = dense.get_parameter(name).grad
                assert whole is not None
                wanted = whole.movedim(plan.entries[name].dims[0], 0)[index]
                torch.testing.assert_close(parameter.grad, wanted)
        plan.verify()


def test_a_hook_inside_experts_counts_under_a_plan() -> None:
    model = build("mixtral", dtype=torch.float64)
    name = next(name for name, _ in model.named_modules() if name.endswith("experts.act_fn"))
    model.get_submodule(name).register_forward_hook(hook)
    before = loss_of(model)
    with ssah.freeze(model, draw(model)):
        torch.testing.assert_close(loss_of(model), before)


def test_a_hook_on_an_ungated_ffn_counts_under_a_plan() -> None:
    model = build("gpt2").double()
    model.transformer.h[0].mlp.act.register_forward_hook(hook)
    before = loss_of(model)
    with ssah.freeze(model, draw(model)):
        torch.testing.assert_close(loss_of(model), before)


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_a_hook_among_channels_that_a_plan_has_moved_is_refused(part: str, register: str) -> None:
    model = build("llama")
    module = model.get_submodule(f"{MLP}.{part}")
    with ssah.freeze(model, draw(model)):
        with pytest.raises(RuntimeError, match=r"before the plan is made"):
            getattr(module, register)(lambda *_: None)
        loss_of(model)
        getattr(model.model.layers[0].self_attn.o_proj, register)(lambda *_: None)
    getattr(module, register)(lambda *_: None)


def test_a_hook_on_the_activation_between_moved_channels_is_refused() -> None:
    model = build("llama")
    with ssah.freeze(model, draw(model)):
        handle = model.get_submodule(f"{MLP}.act_fn").register_forward_hook(hook)
        with pytest.raises(RuntimeError, match=r"before the plan is made"):
            loss_of(model)
        handle.remove()
        loss_of(model)


@pytest.mark.parametrize("metric", METRICS)
def test_a_hook_on_the_backbone_counts_once(metric: str) -> None:
    model = build("llama").double()

    def doubled(_: nn.Module, args: Any, out: Any) -> Any:
        out.last_hidden_state = 2 * out.last_hidden_state
        return out

    model.model.register_forward_hook(doubled)
    name = f"{MLP}.down_proj"
    scores = ssah.attribute(model, [batch()], metric=metric, tokens="all").scores[name]
    # The slope of the loss is taken in float32.
    torch.testing.assert_close(scores, expected(model, metric, name), rtol=1e-4, atol=1e-5)


def test_what_hangs_on_the_model_around_its_backbone_is_refused() -> None:
    model = build("llama")
    handle = model.register_forward_pre_hook(lambda _, args: None)
    with pytest.raises(ValueError, match=r"forward pre-hooks.*Register them on model\.model"):
        ssah.attribute(model, [batch()])
    handle.remove()
    own = model.forward
    model.forward = lambda *args, **options: own(*args, **options)
    with pytest.raises(ValueError, match=r"in place of its class's.*del model\.forward"):
        ssah.attribute(model, [batch()])
    del model.forward
    ssah.attribute(model, [batch()])


def test_an_ffn_without_hooks_is_fused() -> None:
    model = build("llama")
    gated = find_modules(model)[f"{MLP}.down_proj"].gated
    assert gated is not None
    assert gated.is_plain
    handle = model.get_submodule(f"{MLP}.down_proj").register_forward_pre_hook(pre_hook)
    assert not gated.is_plain
    handle.remove()
    assert gated.is_plain
