"""LoRA: low-rank adapters train in the place of the weights, and are merged at the end.

Hu et al., ICLR 2022, arXiv 2106.09685. With A ``[r, in]`` and B ``[out, r]`` for W ``[out, in]``:

    W' = W + (alpha / r) B A            B = 0 at first, alpha = 2 r

A matrix [576, 576] of rank 16 has 16 * (576 + 576) = 18,432 numbers that train, 5.6 % of its own.

**The control** trains as many single weights of each matrix, drawn at random, at the learning rate
of a fine-tune. It has as few numbers as LoRA, and nothing of LoRA's choice: a change of low rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssah.methods.drawing import shuffled
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Procedure, TrainingSetup, planned
from ssah.selections import weights
from ssah.settings import setting
from ssah.training import train_only
from ssah.units import BitMask


@dataclass(frozen=True)
class LoRA(Method):
    """Train low-rank adapters."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al., LoRA, ICLR 2022, arXiv 2106.09685"
    equation: ClassVar[str] = "W' = W + (alpha / r) B A, alpha = 2 r; A and B train"
    stage: ClassVar[Stage] = "during"
    needs: ClassVar[tuple[Need, ...]] = ("aligned",)
    packages: ClassVar[tuple[str, ...]] = ("peft",)
    departures: ClassVar[tuple[str, ...]] = (
        "All linear layers but the head have adapters; the paper adapts queries and values.",
        "The paper is not about safety; that adapters forget less is what others found.",
    )
    against: ClassVar[str] = "As many single weights of each matrix, at random, train alone."
    published: ClassVar[str] = "Adapters learn less and forget less (arXiv 2405.09673; no safety)."

    rank: int = setting(16, "r: rank of an adapter.", min=1)
    lr_scale: float = setting(10.0, "Learning rate, as a multiple of a full fine-tune's.", above=0)

    def _find(self, inputs: Inputs) -> Procedure:
        return Procedure(
            lambda model, seed: replace(lora(model, self.rank, seed), lr_scale=self.lr_scale),
            lambda seed: lambda model, _: _sparse(model, self.rank, seed),
            facts={"rank": self.rank},
        )


def lora(model: PreTrainedModel, rank: int, seed: int) -> TrainingSetup:
    """Low-rank adapters of all linear layers but the head, scaled by 2; merged at the end.

    Args:
        model: gets the adapters.
        rank: of an adapter.
        seed: of what A is at first.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import LoraConfig, get_peft_model  # imported when needed: it takes seconds

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # peft draws A on the CPU. The generators of GPUs, of which there may be many, stay as they are.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        adapted = get_peft_model(model, config)

    def finish() -> PreTrainedModel:
        # Merged, so that every arm is measured as an ordinary model is.
        merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[assignment]
        return merged

    return TrainingSetup(adapted, None, finish)


def _sparse(model: PreTrainedModel, rank: int, seed: int) -> TrainingSetup:
    """Of each matrix, as many random weights train as adapters of this rank have."""
    head = model.get_output_embeddings()
    chosen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            weight = module.weight
            # Of a small matrix adapters may have more numbers than it has itself.
            count = min(rank * sum(weight.shape), weight.numel())
            first = (torch.arange(weight.numel()) < count).view(weight.shape)
            chosen[f"{name}.weight"] = BitMask.of(shuffled(first, seed, name))
    return planned(train_only(model, weights(model, chosen)))
