"""What each of many selections does to a model: the effect of taking it out, by forward passes.

With p the intact model's distribution of the first token of the response, and q that of the model
without a selection, both after the same prompt; and h, h' the hidden states of both at one layer
and position:

    KL(p || q)  = sum over tokens v of p(v) (log p(v) - log q(v))        0: nothing changes there
    log_prob    = sum over response tokens t of log q(t | what stands before)
    l2          = |h' - h|
    cosine distance = 1 - h . h' / (|h| |h'|)                            0: the same direction

Example: p = (0.5, 0.5) and q = (0.25, 0.75) have a KL of 0.5 log 2 + 0.5 log(2/3) = 0.144 nats.
h = (3, 0) and h' = (0, 4) have an l2 of 5 and a cosine distance of 1. Where the response is a
refusal, a log_prob that falls says that the selection carries the refusal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssah.attribution import Batch, BatchReader
from ssah.choices import check_choice
from ssah.data import IGNORE_INDEX, check_count
from ssah.evaluation.measures import logits_at
from ssah.evaluation.selection_effects.divergence import kl_divergence
from ssah.interventions import arms
from ssah.models import as_it_was, check_whole
from ssah.representations import (
    Positions,
    StatePositions,
    check_positions,
    layers_of,
    recorded,
)
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# One number of a selection: the mean of one of these. All grow with what is lost.
HIDDEN_EFFECTS = ("l2", "cosine_distance")  # they need layers
EFFECTS = ("kl", "log_prob", *HIDDEN_EFFECTS)


@dataclass(frozen=True, eq=False)
class Effects:
    """What selections do, row by row; rows are in the order of the loader.

    Attributes:
        kl: float64 ``[selections, rows]``, KL(intact || without it) at the first token of the
            response, in nats.
        log_prob: float64 ``[selections, rows]``, of the whole response without it, in nats.
        intact: float64 ``[rows]``, log-probability of the response by the intact model.
        l2: float64 ``[selections, rows, positions, layers]``, how far the hidden state moves.
        cosine_distance: the same as 1 - cosine, from 0 to 2.
    """

    kl: Tensor
    log_prob: Tensor
    intact: Tensor
    l2: Tensor
    cosine_distance: Tensor

    def mean(self, effect: str) -> Tensor:
        """One number of each selection, float64 ``[selections]``: the larger, the more it does.

        Args:
            effect: ``"kl"``; ``"log_prob"``: by how much that of the response falls; ``"l2"`` or
                ``"cosine_distance"``, over all layers and positions that were asked for.

        Raises:
            ValueError: it is another, or no layer was asked for.
        """
        check_choice("effect", effect, EFFECTS)
        values = {
            "kl": self.kl,
            "log_prob": self.intact - self.log_prob,
            "l2": self.l2,
            "cosine_distance": self.cosine_distance,
        }[effect]
        if not values.numel():
            raise no_layers(effect)
        return values.flatten(1).mean(1)


def no_layers(effect: str) -> ValueError:
    """The error of an effect on hidden states where no layer was asked for."""
    return ValueError(f"effect is {effect!r}, which needs layers, such as layers=[12]")


def effects(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    selections: Sequence[UnitSet],
    *,
    layers: Iterable[int] = (),
    positions: Positions = ("last",),
    arms_at_once: int = 8,
) -> Effects:
    """The effect of taking out each selection, all of them in shared batches (`ssah.arms`).

    The model runs in evaluation mode, and is left as it was.

    Args:
        model: a causal language model of transformers.
        loader: batches with ``input_ids`` and ``labels``, of ``ssah.data.make_loader`` for one.
        selections: what is taken out, each by itself.
        layers: whose hidden states are compared, from 0; none by default.
        positions: at which tokens, as of `ssah.representations.represent`.
        arms_at_once: how many arms share a batch, which has that many times its rows; the intact
            model is one of them.

    Raises:
        TypeError: a selection is neither a `UnitSet` nor a `Selection` of units and heads, or a
            batch is not of this form.
        ValueError: no selection, no batch, a selection of another model, ``arms_at_once`` below 1,
            a row without a response token, layers that the model lacks, or positions that a row
            lacks.
        FloatingPointError: an effect is NaN or infinite.
    """
    check_count("arms_at_once", arms_at_once)
    if not selections:
        raise ValueError("selections is empty, must have at least one")
    arms(model, selections)  # refuses what is wrong before a batch is read
    at = check_positions(positions)
    wanted = layers_numbered(model, layers)
    reader = BatchReader(check_whole(model), tokens="labels")
    found = []
    for number, raw in enumerate(loader):
        batch = reader.read(raw, number)
        where = StatePositions.of(batch, at, number)  # refuses a row without a response too
        with as_it_was(model), torch.inference_mode():
            found.append(_of_batch(model, batch, selections, wanted, where, arms_at_once))
    if not found:
        raise ValueError("loader is empty, must have at least one batch")
    kl, log_prob, l2, cosine = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    if not all(bool(each.isfinite().all()) for each in (kl, log_prob, l2, cosine)):
        raise FloatingPointError(
            "effects are NaN or infinite: so are the model's logits or hidden states somewhere"
        )
    return Effects(kl[1:], log_prob[1:], log_prob[0], l2[1:], cosine[1:])


def layers_numbered(model: PreTrainedModel, layers: Iterable[int]) -> list[nn.Module]:
    """The decoder layers with these numbers, from 0; ValueError where the model lacks one."""
    every, numbers = layers_of(model), list(layers)
    if any(number not in range(len(every)) for number in numbers):
        raise ValueError(
            f"layers is {numbers}; must be numbers of layers, from 0 to {len(every) - 1}"
        )
    return [every[number] for number in numbers]


def _of_batch(
    model: PreTrainedModel,
    batch: Batch,
    selections: Sequence[UnitSet],
    layers: Sequence[nn.Module],
    where: StatePositions,
    arms_at_once: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL and log-probability, float64 ``[1 + selections, rows]`` on the CPU, the intact first; then
    l2 and cosine distance, ``[1 + selections, rows, positions, layers]``."""
    targets = batch.targets  # [rows, length]: the token that each position is to predict
    predicts = targets != IGNORE_INDEX
    count = predicts.sum(1).tolist()  # [rows]
    wanted = targets[predicts].split(count)
    every: list[UnitSet | None] = [None, *selections]
    kl = torch.zeros(len(every), len(targets), dtype=torch.float64)
    log_prob = torch.zeros_like(kl)
    intact: list[Tensor] = []  # of each row [vocabulary]: what all arms are compared with
    before = torch.zeros(0)  # states of the intact model, [rows, positions, layers, hidden]
    moved: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(every), arms_at_once):
        chunk = every[start : start + arms_at_once]
        with arms(model, chunk) as run, recorded(layers, where) as states:
            everywhere = predicts.repeat(len(chunk), 1)  # [arms * rows, length]
            logits = logits_at(model, run.repeat(batch.inputs), everywhere)
        # [arms, rows, positions, layers, hidden]; no state of an arm is kept beyond its batch
        none = kl.new_zeros(len(chunk), *where.mask.shape[:2], 0, 1)
        after = torch.stack([states[layer] for layer in layers], 3) if layers else none
        before = after[0].clone() if start == 0 else before
        cosine = F.cosine_similarity(after, before, dim=-1)
        moved.append(((after - before).norm(dim=-1), 1 - cosine))
        by_arm = run.split(logits)  # [arms, positions of all rows, vocabulary]
        for arm, own in enumerate(by_arm, start):
            for row, (ours, target) in enumerate(zip(own.split(count), wanted, strict=True)):
                # Row by row: in float64 the logits of a whole batch would take four times as much.
                log_q = ours.double().log_softmax(-1)  # [n, vocabulary]
                if arm == 0:
                    intact.append(log_q[0].clone())
                log_p = intact[row]
                kl[arm, row] = kl_divergence(log_p, log_q[0])
                log_prob[arm, row] = log_q.gather(1, target.to(log_q.device)[:, None]).sum()
    l2, distance = (torch.cat(parts) for parts in zip(*moved, strict=True))
    return kl, log_prob, l2, distance
