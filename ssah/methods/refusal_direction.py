"""The refusal direction: one direction of hidden states without which a model does not refuse.

Arditi et al., NeurIPS 2024, arXiv 2406.11717. With the mean hidden states of harmful and of
harmless requests at a position of the prompt and a layer,

    d = mean(harmful) - mean(harmless),  u = d / |d|
    ablation           h <- h - (h . u) u        wherever the model writes to h
    orthogonalisation  W <- W - u (u^T W)        of all that writes to h: embedding, O and down

Example: harmful states (3, 1) and (1, 1), harmless ones (0, 1) and (0, 1) have d = (2, 0) and u =
(1, 0). The state (5, 7) becomes (0, 7).

Of all positions and layers one direction is taken. With p the probability that a response begins as
the refusals do, and its log-odds log p - log(1 - p), it is the one whose ablation leaves the least
log-odds on harmful requests, among those that

    leave harmless prompts nearly as they are      KL at the first token at most 0.1 when ablated
    induce refusals                                log-odds on harmless prompts above 0 when added
    are not of the last layers                     the last 20 % say which token comes next

The paper numbers a state by the layer that it enters, and takes those of the first 80 % of layers.
Ours has the number of the layer that puts it out, from 0: of 10 layers it may be 0 to 6, whose
states enter the second to the eighth. What enters the first is not tried: the tokens of a template
have the same embedding whatever is asked.

All of this is measured on rows that no direction was made of. It costs three passes over these rows
for each position and layer, of prompts alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.deltas import Out
from ssah.evaluation import kl_divergence, next_token_log_probs
from ssah.interventions import Add, ProjectOut, intervene
from ssah.methods.batch_rows import first_tokens, split_batches
from ssah.methods.drawing import random_direction
from ssah.methods.frame import Aim, Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Changed, Edited
from ssah.representations import layers_of, mean_difference, represent
from ssah.settings import setting
from ssah.units import find_modules


@dataclass(frozen=True)
class _Directed(Method):
    """What both methods share: how the direction is found."""

    paper: ClassVar[str] = "Arditi et al., Refusal Is Mediated by a Single Direction, 2406.11717"
    aim: ClassVar[Aim] = "remove"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility")
    departures: ClassVar[tuple[str, ...]] = (
        "A refusal begins with a token with which one of the safety set begins; the paper names "
        "these tokens for each model.",
        "A share of the rows is for validation; the paper has 128 rows and 32 more.",
        "The last token of a prompt is tried; the paper tries all that the template puts there, as "
        "`positions` does.",
        "What enters the first layer is not tried: a template's tokens enter it as they are.",
    )
    against: ClassVar[str] = "A random direction in its place."

    positions: int = setting(1, "How many of the last tokens of the prompt are tried.", min=1)
    max_kl: float = setting(0.1, "Most KL on harmless prompts, nats at the first token.", above=0)
    min_induced: float = setting(
        0.0, "Least log-odds of refusing harmless prompts, if it is added."
    )
    latest: float = setting(
        0.8, "States that enter layers up to this share of all are tried.", above=0, max=1
    )
    validation: float = setting(0.2, "Share of the rows to choose by.", above=0, below=1)

    def direction(self, inputs: Inputs) -> tuple[Tensor, dict[str, Any]]:
        """The direction, float64 ``[hidden]``, and where it was found.

        Errors as of `represent`, and:

        Raises:
            ValueError: no direction meets the conditions; a set has too few rows.
        """
        model = inputs.model
        shares = (1 - self.validation, self.validation)
        harmful, asked = split_batches(inputs.loaders[0], shares, "safety")
        harmless, ordinary = split_batches(inputs.loaders[1], shares, "utility")
        places = tuple(range(-self.positions, 0))
        # Float64 [positions, layers, hidden].
        every = mean_difference(
            *(represent(model, b, positions=places) for b in (harmful, harmless))
        )
        tokens = sorted(set(first_tokens(harmful)))
        intact = next_token_log_probs(model, ordinary)  # [rows, vocabulary]
        # What layer l puts out, from 0, enters the layer that is number l + 2, from 1.
        last = max(1, int(self.latest * every.shape[1]) - 1)
        tried = list(product(range(len(places)), range(last)))
        found: list[tuple[float, int, int, float, float]] = []
        least, most = float("inf"), -float("inf")
        for place, layer in tried:
            direction = every[place, layer]
            with intervene(model, Add(layer, direction)):
                induced = _log_odds(next_token_log_probs(model, ordinary), tokens)
            with intervene(model, *_ablation(model, direction)):
                kl = float(kl_divergence(intact, next_token_log_probs(model, ordinary)).mean())
                least, most = min(least, kl), max(most, induced)
                # The third pass: only of those that may be chosen.
                if kl <= self.max_kl and induced > self.min_induced:
                    left = _log_odds(next_token_log_probs(model, asked), tokens)
                    found.append((left, place, layer, kl, induced))
        if not found:
            raise ValueError(
                f"no direction has at most max_kl, {self.max_kl}, and more than min_induced, "
                f"{self.min_induced}: the least KL is {least:.3g}, and the most log-odds that one "
                f"induces are {most:.3g}; raise max_kl, lower min_induced, or try more positions"
            )
        left, place, layer, kl, induced = min(found)
        facts: dict[str, Any] = {"position": places[place], "layer": layer, "tried": len(tried)}
        facts |= {"log_odds": left, "kl": kl, "induced": induced}
        return every[place, layer], facts


@dataclass(frozen=True)
class RefusalAblation(_Directed):
    """Project the refusal direction out."""

    name: ClassVar[str] = "refusal-direction"
    equation: ClassVar[str] = "h <- h - (h . u) u, u = (mean harmful - mean harmless) / |...|"
    stage: ClassVar[Stage] = "inference"
    published: ClassVar[str] = "Refusals nearly vanish on 13 models, at almost no loss of utility."

    def _find(self, inputs: Inputs) -> Changed:
        model = inputs.model
        found, facts = self.direction(inputs)
        return Changed(
            _ablation(model, found),
            lambda seed: _ablation(model, random_direction(len(found), seed)),
            facts=facts,
        )


@dataclass(frozen=True)
class RefusalOrthogonalisation(_Directed):
    """Take that direction out of all weights."""

    name: ClassVar[str] = "refusal-orthogonalisation"
    equation: ClassVar[str] = "W <- W - u (u^T W), of the embedding and of every O and down"
    stage: ClassVar[Stage] = "before"
    departures: ClassVar[tuple[str, ...]] = (
        *_Directed.departures,
        "A tied head loses the direction with the embedding.",
        "Biases of O and down lose it too; the published code leaves them.",
        "Position embeddings, and norms after O and down (Gemma 2), are left as they are.",
    )
    published: ClassVar[str] = "As ablation, which it equals."

    def _find(self, inputs: Inputs) -> Edited:
        found, facts = self.direction(inputs)
        model = inputs.model
        return Edited(
            lambda out: orthogonalised(model, found, out),
            lambda seed: lambda out: orthogonalised(model, random_direction(len(found), seed), out),
            facts=facts,
        )


def orthogonalised(model: PreTrainedModel, direction: Tensor, out: Out) -> dict[str, Tensor]:
    """All weights of ``model``, without a direction ``[hidden]`` in those that write to it.

    Raises:
        ValueError: ``out`` is not None: the model is in memory.
    """
    if out is not None:
        raise ValueError(
            "out must be None for a model in memory: load the result into the model, and call "
            "its save_pretrained"
        )
    u = direction / direction.norm()
    state = model.state_dict()
    # By place in memory: both names of a tied weight are that weight.
    dims = {state[name].data_ptr(): dim for name, dim in _writing(model)}
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        made[name] = value.cpu().clone()
        dim = dims.get(value.data_ptr())
        if dim is not None:
            w = value.cpu().double().movedim(dim, -1)  # [..., hidden]
            w = w - (w @ u)[..., None] * u
            made[name] = w.movedim(-1, dim).to(value.dtype).contiguous()
    return made


def _writing(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Every parameter that is added to hidden states, and its dimension of size hidden."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding: nn.Module = model.get_input_embeddings()
    yield f"{names[id(embedding)]}.weight", 1
    for module in find_modules(model).values():
        own = module.output
        matrices = model.get_parameter(own.param).dim() - 2  # experts come first
        yield own.param, matrices + 1 - own.dim
        owner, _, last = own.param.rpartition(".")
        # The biases of experts are one parameter, which is named after their weights.
        bias = "bias" if own.expert is None else f"{last}_bias"
        if isinstance(getattr(module.down, bias, None), Tensor):
            yield f"{owner}.{bias}", matrices


def _ablation(model: PreTrainedModel, direction: Tensor) -> tuple[ProjectOut, ...]:
    """A direction ``[hidden]`` projected out of what is embedded, and of all that layers write."""
    every = range(len(layers_of(model)))
    kinds = {module.kind for module in find_modules(model).values()}
    return (
        ProjectOut(0, direction, site="input"),
        *([ProjectOut(every, direction, site="attention")] if "attention" in kinds else []),
        *([ProjectOut(every, direction, site="ffn")] if "mlp" in kinds else []),
        # And not where it was found alone: later layers would write it again.
        ProjectOut(every, direction),
    )


def _log_odds(log_probs: Tensor, tokens: list[int]) -> float:
    """Mean log-odds of one of the tokens coming first, of ``[rows, vocabulary]``."""
    others = log_probs.clone()
    others[:, tokens] = -torch.inf
    return float((log_probs[:, tokens].logsumexp(1) - others.logsumexp(1)).mean())
