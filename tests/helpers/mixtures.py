"""What routed experts compute, written out in plain PyTorch: what they are compared with."""

from __future__ import annotations

import functools
import math

import torch
from tiny_models import IGNORED
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution import Attribution
from ssah.units import DepthTwoModule, UnitSet, find_modules

# Both sides are float64, but the slope of the loss is taken in float32.
TOLERANCE = {"variance": 1e-9, "norm": 1e-9, "taylor": 1e-5, "fisher": 1e-5}


def activation(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What enters one expert's B: ``[tokens, n_units]``."""
    weight = experts.get_parameter("gate_up_proj").detach()[expert]
    kind = type(experts).__name__
    if kind == "GptOssExperts":
        both = x @ weight + experts.get_parameter("gate_up_proj_bias").detach()[expert]
        gate, up = both[:, ::2].clamp(max=0.5), both[:, 1::2].clamp(-0.5, 0.5)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    gate, up = (x @ weight.T).chunk(2, -1)
    if kind == "Gemma4TextExperts":
        slope = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return gate / 2 * (1 + torch.tanh(slope)) * up
    return gate / (1 + torch.exp(-gate)) * up


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def column(module: DepthTwoModule) -> Tensor:
    """B's weight of any module, ``[out, n_units]``."""
    weight = module.weight.detach()
    return weight if module.output.dim == 1 else weight.T


class Capture:
    """What enters every B in the model's own forward, and dL/d of it, at tokens that count."""

    def __init__(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        self.a: dict[str, list[Tensor]] = {}
        self.product: dict[str, list[Tensor]] = {}
        self.reached: dict[str, list[Tensor]] = {}  # which of these tokens were routed there
        self.found = find_modules(model)
        for batch in batches:
            self._read(model, batch)

    def _read(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
        seen: dict[nn.Module, tuple[Tensor, ...]] = {}

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            seen[module] = args

        def after(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            out.retain_grad()
            seen[module] = (*args, out)

        hooks = []
        for module in self.found.values():
            if module.expert is None:
                hooks.append(module.down.register_forward_pre_hook(before))
            elif module.expert == 0:
                hooks.append(module.down.register_forward_hook(after))
        attended = batch["attention_mask"].bool()
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        if not bool(attended[:, 0].all()):
            # Padding on the left. Relative positions are the same without, but for float32 in
            # their rotation.
            inputs["position_ids"] = (attended.long().cumsum(1) - 1).clamp_min(0)
        logits = model(**inputs, use_cache=False).logits
        targets = batch.get("labels", batch["input_ids"])[:, 1:]
        targets = targets.masked_fill(~(attended[:, 1:] & attended[:, :-1]), IGNORED)
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
        ).backward()
        for hook in hooks:
            hook.remove()
        counted = attended.flatten()
        if "labels" in batch:
            counted = counted & (batch["labels"] != IGNORED).flatten()
        for name, module in self.found.items():
            x, *routing = seen[module.down]
            if module.expert is None:
                a, grad = x.flatten(0, -2), gradient(x).flatten(0, -2)
                reached = torch.ones_like(counted)
            else:
                chosen, weights, out = routing
                weight = (weights * (chosen == module.expert)).sum(1, keepdim=True)
                a = activation(module.down, module.expert, x)
                grad = weight * (gradient(out) @ column(module))
                reached = (chosen == module.expert).any(1)
            self.a.setdefault(name, []).append(a.detach()[counted])
            self.product.setdefault(name, []).append((a * grad).detach()[counted])
            self.reached.setdefault(name, []).append(reached[counted])
        model.zero_grad()

    def score(self, name: str, metric: str, counts: Tensor) -> Tensor:
        a, product = torch.cat(self.a[name])[counts], torch.cat(self.product[name])[counts]
        norms = column(self.found[name]).square().sum(0)
        if metric == "taylor":
            return product.sum(0).abs()
        if metric == "fisher":
            return product.square().sum(0)
        if len(a) < (2 if metric == "variance" else 1):
            return torch.zeros_like(norms)
        return (a.var(0) if metric == "variance" else a.square().mean(0)) * norms

    def check(self, result: Attribution) -> None:
        assert list(result.scores) == list(self.found)
        for name in self.found:
            counts = torch.cat(self.reached[name]) | result.all_experts
            a, score = torch.cat(self.a[name])[counts], self.score(name, result.metric, counts)
            assert result.count[name] == len(a)
            if len(a):
                torch.testing.assert_close(result.mean[name], a.mean(0), rtol=1e-9, atol=1e-12)
            bound = TOLERANCE[result.metric] * (score + score.mean())
            assert bool(((result.scores[name] - score).abs() <= bound).all()), name


def keep_out(model: PreTrainedModel, units: UnitSet) -> None:
    """Let the channels of ``units`` reach no B: by hooks, and by experts written out."""
    kept: dict[nn.Module, list[Tensor]] = {}
    for name, module in find_modules(model).items():
        own = (~units.mask(name)).double()
        if module.expert is None:
            module.down.register_forward_pre_hook(lambda _, args, own=own: (args[0] * own,))
        else:
            kept.setdefault(module.down, []).append(own)
    for experts, masks in kept.items():
        experts.forward = functools.partial(_masked, experts, masks)


def _masked(
    experts: nn.Module, kept: list[Tensor], x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The forward of ``experts`` whose channel j is multiplied by ``kept[expert][j]``."""
    out = torch.zeros_like(x)
    for expert, own in enumerate(kept):
        b = experts.get_parameter("down_proj").detach()[expert]
        b = b if experts.is_transposed else b.T
        y = (activation(experts, expert, x) * own) @ b
        if experts.has_bias:
            y = y + experts.get_parameter("down_proj_bias").detach()[expert]
        out += (weights * (chosen == expert)).sum(1, keepdim=True) * y
    return out
