"""SOMF: a mask over what fine-tuning changed, learnt from preferences.

Yi et al. 2024, arXiv 2405.09055. With a the aligned and t the tuned weights, tau = t - a, and one
logit m_i for each weight of a matrix, 0 at first:

    M_i = sigmoid((m_i + log u - log(1 - u)) / T)      relaxed Bernoulli, u uniform, T = 0.5
    W = a + scale tau M / mean(M)                      of each matrix
    m is trained by DPO (`ssah.training.preference_loss`); its reference is the mask off, W = t

Example: tau = (2, 2), and a draw of the mask is (0.9, 0.3) with the mean 0.6. The change is (3, 1).

In the end one more M is drawn. It is taken as it is (soft), or as M > 0.5 (binary). Training takes
about ten times the memory of the matrices: logits and their moments, weights and what made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssah.attribution import Batch, BatchReader, find_matrices
from ssah.data import Collator, Pair, answered, encode
from ssah.deltas import Deltas, Maker
from ssah.evaluation import response_log_probs
from ssah.methods.drawing import generator_of, relaxed_bernoulli, shuffled
from ssah.methods.editing import by_parameter, edited
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Edited
from ssah.models import as_it_was
from ssah.settings import setting
from ssah.training import fit, log_probs_under, preference_loss


@dataclass(frozen=True)
class SOMF(Method):
    """Mask the change, by preferences."""

    name: ClassVar[str] = "somf"
    paper: ClassVar[str] = "Yi et al., Subspace-oriented model fusion, arXiv 2405.09055"
    equation: ClassVar[str] = "W = W_aligned + scale tau M / mean(M), M relaxed Bernoulli, by DPO"
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "tuned", "tokenizer", "preferences")
    departures: ClassVar[tuple[str, ...]] = (
        "The change of whole matrices is masked; the published code masks both factors of LoRA.",
        "One tuned model is fused with the aligned one; the paper fuses several, by one mask.",
        "What is drawn has a seed; the published code exports another draw each time.",
        "Matrices of layers are masked; everything else stays that of the tuned model.",
    )
    against: ClassVar[str] = "The same mask with the entries of each matrix in random places."
    published: ClassVar[str] = "About as safe as the aligned model, at little loss of the tasks."
    strength: ClassVar[str | None] = "scale"
    # The paper adds one task's change whole, and of several 0.3 to 0.4.
    strengths: ClassVar[tuple[float, ...]] = (0.3, 0.6, 1.0)

    scale: float = setting(1.0, "How much of the masked change is added.", above=0)
    export: Literal["soft", "binary"] = setting("soft", "How the last draw is taken.")
    temperature: float = setting(0.5, "T of the relaxed Bernoulli.", above=0)
    beta: float = setting(0.1, "Of DPO.", above=0)
    lr: float = setting(1e-3, "Learning rate of the logits.", above=0)
    batch_size: int = setting(16, "Pairs in a batch.", min=1)
    epochs: int = setting(1, "Passes over the pairs.", min=1)
    max_length: int = setting(512, "The most tokens of a row.", min=2)
    seed: int = setting(0, "Of all that is drawn.", min=0)

    def _find(self, inputs: Inputs) -> Edited:
        rows, tokenizer = inputs.pairs, inputs.tokenizer
        assert tokenizer is not None
        aligned, _ = inputs.before_and_after
        model = inputs.tuned_model
        logits, losses = self._fitted(model, Deltas(aligned, [model]), rows, tokenizer)
        masks = {name: self._last(name, own) for name, own in logits.items()}

        def plan(deltas: Deltas, seed: int | None) -> Maker:
            def drawn(param: str) -> Tensor:
                return masks[param] if seed is None else shuffled(masks[param], seed, param)

            tuned, own = deltas.tuned[0], by_parameter(deltas, drawn)

            def make(name: str) -> Tensor:
                a, (t,) = deltas.read(name)
                if tuned.param(name) not in masks:
                    return t
                change = (t.double() - a.double()) * own(name).double()
                return (a.double() + self.scale * change).to(t.dtype)

            return make

        return edited(
            self, inputs.aligned, [inputs.tuned], plan, first_loss=losses[0], last_loss=losses[-1]
        )

    def _fitted(
        self,
        model: PreTrainedModel,
        deltas: Deltas,
        rows: Sequence[Pair],
        tokenizer: PreTrainedTokenizerBase,
    ) -> tuple[dict[str, Tensor], list[float]]:
        """The logits of each matrix after training, of its shape, and the loss of each batch.

        ``deltas`` are of ``model``.
        """
        tuned = {name: model.get_parameter(name).detach() for name in find_matrices(model)}
        tau = {
            name: own - deltas.read(name)[0].to(own.device, own.dtype)
            for name, own in tuned.items()
        }
        logits = {
            name: torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))
            for name, own in tuned.items()
        }
        generator = torch.Generator().manual_seed(self.seed)

        def loss(of: tuple[Batch, Tensor]) -> Tensor:
            batch, reference = of  # reference: [2 pairs], the chosen ones first
            weights = {}
            for name, own in logits.items():
                mask = relaxed_bernoulli(own, self.temperature, generator)
                # a + scale tau M / mean(M), from t: a is not needed any more.
                factor = self.scale * mask / mask.mean() - 1
                weights[name] = tuned[name] + tau[name] * factor.to(tau[name].dtype)
            log_probs, _ = log_probs_under(model, weights, batch)
            chosen, rejected = log_probs.chunk(2)
            before_chosen, before_rejected = reference.to(log_probs).chunk(2)
            return preference_loss(chosen, rejected, before_chosen, before_rejected, self.beta)

        batches = self._batches(model, rows, tokenizer)
        steps = self.epochs * len(batches)
        with as_it_was(model):
            leaves = [own.requires_grad_() for own in logits.values()]
            losses = fit(leaves, loss, batches, lr=self.lr, steps=steps)
        return {name: own.detach() for name, own in logits.items()}, losses

    def _batches(
        self,
        model: PreTrainedModel,
        rows: Sequence[Pair],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[tuple[Batch, Tensor]]:
        """Pairs as one batch, the chosen answers first, with what the tuned model gives them."""
        collator, reader = Collator(tokenizer), BatchReader(model, tokens="labels")
        sides: tuple[Literal["chosen"], Literal["rejected"]] = ("chosen", "rejected")
        encoded = [
            list(
                encode((answered(row, side) for row in rows), tokenizer, max_length=self.max_length)
            )
            for side in sides
        ]
        found: list[tuple[Batch, Tensor]] = []
        for start in range(0, len(rows), self.batch_size):
            raw = collator([row for own in encoded for row in own[start : start + self.batch_size]])
            ((reference, _),) = response_log_probs(model, [raw])  # [2 pairs]
            found.append((reader.read(raw, len(found)), reference))
        return found

    def _last(self, name: str, logits: Tensor) -> Tensor:
        """M / mean(M) of the draw that is exported, of the shape of ``logits``, on the CPU."""
        # Of each matrix its own: what is drawn does not depend on which others there are.
        generator = generator_of(self.seed, name)
        mask = relaxed_bernoulli(logits.cpu(), self.temperature, generator)
        mask = (mask > 0.5).to(mask.dtype) if self.export == "binary" else mask
        # A mask that keeps nothing leaves the aligned weights: 0, and not 0 / 0.
        return mask / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny)
