"""The refusal direction: one direction of hidden states without which a model does not refuse.

Arditi et al., NeurIPS 2024, arXiv 2406.11717. With the mean hidden states of harmful and of
harmless requests at a position of the prompt and a layer,

    d = mean(harmful) - mean(harmless),  u = d / |d|
    ablation           h <- h - (h . u) u        wherever the model writes to h
    orthogonalisation  W <- W - u (u^T W)        of all that writes to h: embedding, O and down

Example: harmful states (3, 1) and (1, 1), harmless ones (0, 1) and (0, 1) have d = (2, 0) and u =
(1, 0). The state (5, 7) becomes (0, 7).

Of all positions and layers that direction is taken whose ablation makes refusals least likely,
among those that leave harmless prompts nearly as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.deltas import Out
from ssah.evaluation import kl_divergence, next_token_log_probs, response_log_probs
from ssah.interventions import ProjectOut, intervene
from ssah.methods.drawing import random_direction
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Loader, Need
from ssah.methods.outcomes import Changed, Edited
from ssah.representations import layers_of, mean_difference, represent
from ssah.settings import setting
from ssah.units import find_modules


@dataclass(frozen=True)
class _Directed(Method):
    """What both methods share: how the direction is found."""

    paper: ClassVar[str] = "Arditi et al., Refusal Is Mediated by a Single Direction, 2406.11717"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility")
    departures: ClassVar[tuple[str, ...]] = (
        "A direction is chosen on the rows that it was made of, by the log-probability of their "
        "refusals; the paper has 32 rows of validation, and the odds of a few first tokens.",
        "That adding the direction induces refusals is not asked for; the paper asks for it.",
    )
    against: ClassVar[str] = "A random direction in its place."

    positions: int = setting(1, "How many of the last tokens of the prompt are tried.", min=1)
    max_kl: float = setting(0.1, "Most KL on harmless prompts, nats at the first token.", above=0)
    latest: float = setting(0.8, "Layers up to this share of all are tried.", above=0, max=1)

    def direction(self, inputs: Inputs) -> tuple[Tensor, dict[str, Any]]:
        """The direction, float64 ``[hidden]``, and where it was found.

        Errors as of `represent`, and:

        Raises:
            ValueError: all directions change harmless prompts by more than ``max_kl``.
        """
        model, (safety, utility) = inputs.model, inputs.loaders
        places = tuple(range(-self.positions, 0))
        harmful, harmless = (
            represent(model, loader, positions=places) for loader in (safety, utility)
        )
        every = mean_difference(harmful, harmless)  # [positions, layers, hidden]
        n_layers = every.shape[1]
        # Late directions say which token comes next, and hardly whether to refuse.
        last = max(1, int(self.latest * n_layers))
        intact = next_token_log_probs(model, utility)  # [rows, vocabulary]
        tried: list[tuple[float, int, int]] = []
        least = float("inf")
        for place in range(len(places)):
            for layer in range(last):
                with intervene(model, _projected(every[place, layer], n_layers)):
                    other = next_token_log_probs(model, utility)
                    kl = float(kl_divergence(intact, other).mean())
                    least = min(least, kl)
                    # Refusals need the longer pass: only of those that may be chosen.
                    if kl <= self.max_kl:
                        tried.append((_refusals(model, safety), place, layer))
        if not tried:
            raise ValueError(
                f"max_kl is {self.max_kl}, and the least KL of a direction is {least:.3g}; raise "
                "it, or try more positions"
            )
        log_prob, place, layer = min(tried)
        facts = {"position": places[place], "layer": layer, "log_prob": log_prob}
        return every[place, layer], facts


@dataclass(frozen=True)
class RefusalAblation(_Directed):
    """Project the refusal direction out."""

    name: ClassVar[str] = "refusal-direction"
    equation: ClassVar[str] = "h <- h - (h . u) u, u = (mean harmful - mean harmless) / |...|"
    stage: ClassVar[Stage] = "inference"
    departures: ClassVar[tuple[str, ...]] = (
        *_Directed.departures,
        "It is projected out of what each layer puts out; the paper does so after the embedding "
        "and within layers too, as refusal-orthogonalisation does.",
    )
    published: ClassVar[str] = "Refusals nearly vanish on 13 models, at almost no loss of utility."

    def _find(self, inputs: Inputs) -> Changed:
        found, facts = self.direction(inputs)
        n_layers = len(layers_of(inputs.model))
        # At every layer, and not where it was found alone: later layers would write it again.
        return Changed(
            (_projected(found, n_layers),),
            lambda seed: (_projected(random_direction(len(found), seed), n_layers),),
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


def _projected(direction: Tensor, n_layers: int) -> ProjectOut:
    return ProjectOut(range(n_layers), direction)


def _refusals(model: PreTrainedModel, safety: Loader) -> float:
    """Mean log-probability of the refusals, nats a row."""
    found = torch.cat([log_probs for log_probs, _ in response_log_probs(model, safety)])
    return float(found.mean())
