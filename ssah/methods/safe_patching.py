"""SafePatching: two patches made of harmful answers, one against harm, one against over-refusal.

Zhao et al. 2024, arXiv 2405.13820. With t the weights, and harmful requests with harmful answers:

    patch e    what ascent on the answers changes        (safety: they become unlikely)
    patch m    what descent on the answers changes       (less over-refusal: they become likely)
    retained   each entry of a patch with probability p
    S_e        the share a of each matrix with the highest SNIP |W dL/dW| on the answers, under
               t + retained e and among what is retained of it;  S_m likewise with share b
    W = t + alpha e on S_e less S_m + beta m on S_m less S_e

Example: S_e = {1, 2} and S_m = {2, 3}. Entry 1 gets e, entry 3 gets m, and entry 2 stays, as both
want it. Ascent has a bound (`ssah.training.bounded_ascent`): without one it would ruin the model.

The answers are the user's own. They are trained on, and never written anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssah.attribution import Batch, BatchReader, attribute_weights, find_matrices
from ssah.deltas import Deltas, Draw, Maker
from ssah.interventions import Replace, intervene
from ssah.methods.drawing import seed_of
from ssah.methods.editing import by_parameter, edited
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Loader, Need
from ssah.methods.outcomes import Edited
from ssah.models import as_it_was, check_plain
from ssah.settings import setting
from ssah.training import bounded_ascent, fit, log_probs_under
from ssah.units import BitMask


@dataclass(frozen=True, eq=False)
class _Patch:
    """What a short training changed, and where it matters.

    Attributes:
        change: name of a parameter -> what was added to it, of its shape.
        chosen: name of a parameter -> entries with the highest scores.
        loss: of the last batch that was looked at, nats per token.
    """

    change: Mapping[str, Tensor]
    chosen: Mapping[str, BitMask]
    loss: float


@dataclass(frozen=True)
class SafePatching(Method):
    """Patch against harm and over-refusal."""

    name: ClassVar[str] = "safe-patching"
    paper: ClassVar[str] = "Zhao et al., SafePatching, arXiv 2405.13820"
    equation: ClassVar[str] = (
        "W = W_tuned + alpha e[S_e - S_m] + beta m[S_m - S_e], ascent, descent"
    )
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "tuned", "harmful")
    departures: ClassVar[tuple[str, ...]] = (
        "We know the paper by its reviews and abstract: bound, steps, shares and strengths are "
        "ours, and they must be chosen for a model.",
        "The tuned model is patched, as by other methods that come after; the paper patches an "
        "aligned one.",
        "What is retained of a patch is not rescaled, which alpha and beta can do.",
        "Matrices of layers are patched, and nothing else.",
    )
    against: ClassVar[str] = "As many random entries of each matrix of the same two patches."
    published: ClassVar[str] = (
        "Harm 31.7 % -> 3.3 % and refused harmless requests 8.0 % -> 5.6 % (Llama-2-7B-Chat); "
        "either patch alone ruins the other figure."
    )
    strength: ClassVar[str | None] = "alpha"
    # Both ways from the patch as it was trained: half of it, and twice as much.
    strengths: ClassVar[tuple[float, ...]] = (0.5, 1.0, 2.0)

    alpha: float = setting(1.0, "How strongly the patch against harm is added.", min=0)
    beta: float = setting(1.0, "How strongly the patch against over-refusal is added.", min=0)
    harm_share: float = setting(0.03, "a: share of each matrix, against harm.", above=0, max=1)
    refusal_share: float = setting(
        0.02, "b: share of each matrix, against over-refusal.", above=0, max=1
    )
    retained: float = setting(0.3, "p: share of each patch that is retained.", above=0, max=1)
    bound: float = setting(4.0, "Nats per token at which an answer is unlearnt.", above=0)
    steps: int = setting(100, "The most updates of each training.", min=1)
    lr: float = setting(1e-5, "Learning rate of both.", above=0)
    seed: int = setting(0, "Of what is retained.", min=0)

    def _find(self, inputs: Inputs) -> Edited:
        if max(self.harm_share, self.refusal_share) >= self.retained:
            raise ValueError(
                f"harm_share is {self.harm_share} and refusal_share {self.refusal_share}; both "
                f"must be below retained, {self.retained}, of which they are chosen"
            )
        model, harmful = inputs.tuned_model, inputs.harmful
        assert harmful is not None
        check_plain(model, "to be patched")
        against_harm = self._patch(model, harmful, self.harm_share, ascent=True)
        if not any(bool(own.any()) for own in against_harm.change.values()):
            raise ValueError(
                f"bound is {self.bound}, and every harmful answer is that unlikely already; raise "
                "it, or patch nothing"
            )
        against_refusal = self._patch(model, harmful, self.refusal_share, ascent=False)
        parts = (
            (self.alpha, against_harm, against_refusal),
            (self.beta, against_refusal, against_harm),
        )

        def plan(deltas: Deltas, seed: int | None) -> Maker:
            def change(param: str) -> Tensor:
                total = torch.zeros((), dtype=torch.float64)
                for place, (factor, own, other) in enumerate(parts):
                    only = own.chosen[param] - other.chosen[param]
                    if seed is not None:
                        only = BitMask.random(only, seed_of(seed, f"{param}, patch {place}"))
                    added = factor * own.change[param].double()
                    total = total + torch.where(only.to_mask(), added, 0.0)
                return total

            tuned, changes = deltas.tuned[0], by_parameter(deltas, change)

            def make(name: str) -> Tensor:
                weight = tuned.read(name)
                if tuned.param(name) not in against_harm.change:
                    return weight
                return (weight.double() + changes(name)).to(weight.dtype)

            return make

        losses = {"unlearnt_loss": against_harm.loss, "learnt_loss": against_refusal.loss}
        return edited(self, inputs.aligned, [inputs.tuned], plan, **losses)

    def _patch(
        self, model: PreTrainedModel, harmful: Loader, share: float, *, ascent: bool
    ) -> _Patch:
        names = list(find_matrices(model))
        before = {name: model.get_parameter(name).detach() for name in names}
        wide = {
            name: own.to(torch.promote_types(own.dtype, torch.float32), copy=True).requires_grad_()
            for name, own in before.items()
        }

        def loss(batch: Batch) -> Tensor:
            weights = {name: own.to(before[name].dtype) for name, own in wide.items()}
            log_probs, tokens = log_probs_under(model, weights, batch)
            if ascent:
                return bounded_ascent(log_probs, tokens, self.bound)
            return -log_probs.sum() / tokens.sum()

        reader = BatchReader(model, tokens="labels")
        batches = [reader.read(batch, number) for number, batch in enumerate(harmful)]
        if not batches:
            raise ValueError("harmful has no batch; it must have at least one")
        floor = -self.bound if ascent else None
        with as_it_was(model):
            losses = fit([*wide.values()], loss, batches, lr=self.lr, steps=self.steps, floor=floor)
        change = {name: wide[name].detach().sub_(before[name]).cpu() for name in names}
        kept = {
            name: Draw(self.retained, self.seed, name, int(ascent)).mask(own.flatten()).view_as(own)
            for name, own in change.items()
        }
        patched = {
            name: own + (change[name] * kept[name]).to(own.device, own.dtype)
            for name, own in before.items()
        }
        with intervene(model, Replace(names, patched)):
            found = attribute_weights(model, harmful, metric="snip")
        # By score 0 what was not retained comes last; where little was, it may still be reached.
        scores = {name: own * kept[name] for name, own in found.scores.items()}
        top = replace(found, scores=scores).top(share)
        chosen = {name: mask & BitMask.of(kept[name]) for name, mask in top.items()}
        return _Patch(change, chosen, abs(losses[-1]))
