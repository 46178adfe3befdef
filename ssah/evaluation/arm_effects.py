"""What each of many selections does to a model: the effect of taking it out, by forward passes.

With p the intact model's distribution of the first token of the response, and q that of the model
without a selection, both after the same prompt:

    KL(p || q)  = sum over tokens v of p(v) (log p(v) - log q(v))        0: nothing changes there
    log_prob    = sum over response tokens t of log q(t | what stands before)

Example: p = (0.5, 0.5) and q = (0.25, 0.75) have a KL of 0.5 log 2 + 0.5 log(2/3) = 0.144 nats.
Where the response is a refusal, a log_prob that falls says that the selection carries the refusal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.attribution import Batch, BatchReader
from ssah.data import IGNORE_INDEX, check_count
from ssah.evaluation.loss import logits_at
from ssah.interventions import arms
from ssah.models import as_it_was, check_whole
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Effects:
    """What selections do, row by row; rows are in the order of the loader.

    Attributes:
        kl: float64 ``[selections, rows]``, KL(intact || without it) at the first token of the
            response, in nats.
        log_prob: float64 ``[selections, rows]``, of the whole response without it, in nats.
        intact: float64 ``[rows]``, log-probability of the response by the intact model.
    """

    kl: Tensor
    log_prob: Tensor
    intact: Tensor


def effects(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    selections: Sequence[UnitSet],
    *,
    arms_at_once: int = 8,
) -> Effects:
    """The effect of taking out each selection, all of them in shared batches (`ssah.arms`).

    The model runs in evaluation mode, and is left as it was.

    Args:
        model: a causal language model of transformers.
        loader: batches with ``input_ids`` and ``labels``, of ``ssah.data.make_loader`` for one.
        selections: what is taken out, each by itself.
        arms_at_once: how many arms share a batch, which has that many times its rows; the intact
            model is one of them.

    Raises:
        TypeError: a selection is no `UnitSet`, or a batch is not of this form.
        ValueError: no selection, no batch, a selection of another model, ``arms_at_once`` below 1,
            or a row without a response token.
        FloatingPointError: an effect is NaN or infinite.
    """
    check_count("arms_at_once", arms_at_once)
    if not selections:
        raise ValueError("selections is empty, must have at least one")
    arms(model, selections)  # refuses what is wrong before a batch is read
    reader = BatchReader(check_whole(model), tokens="labels")
    found = []
    for number, raw in enumerate(loader):
        batch = reader.read(raw, number)
        if not bool((batch.targets != IGNORE_INDEX).any(1).all()):
            raise ValueError(
                f"batch {number} has a row without a response token, must have one in each "
                "(labels other than -100 after the prompt)"
            )
        with as_it_was(model), torch.inference_mode():
            found.append(_of_batch(model, batch, selections, arms_at_once))
    if not found:
        raise ValueError("loader is empty, must have at least one batch")
    kl, log_prob = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    if not bool(kl.isfinite().all() and log_prob.isfinite().all()):
        raise FloatingPointError("effects are NaN or infinite: so are the model's logits somewhere")
    return Effects(kl[1:], log_prob[1:], log_prob[0])


def _of_batch(
    model: PreTrainedModel, batch: Batch, selections: Sequence[UnitSet], arms_at_once: int
) -> tuple[Tensor, Tensor]:
    """KL and log-probability, float64 ``[1 + selections, rows]`` on the CPU, the intact first."""
    targets = batch.targets  # [rows, length]: the token that each position is to predict
    columns = (targets != IGNORE_INDEX).any(0).nonzero()[:, 0]  # [columns]
    targets = targets[:, columns]
    every: list[UnitSet | None] = [None, *selections]
    kl = torch.zeros(len(every), len(targets), dtype=torch.float64)
    log_prob = torch.zeros_like(kl)
    intact: list[Tensor] = []  # of each row [vocabulary]: what all arms are compared with
    for start in range(0, len(every), arms_at_once):
        chunk = every[start : start + arms_at_once]
        with arms(model, chunk) as run:
            logits = logits_at(model, run.repeat(batch.inputs), columns)
        by_arm = run.split(logits)  # [arms, rows, columns, vocabulary]
        for arm, own in enumerate(by_arm, start):
            for row, target in enumerate(targets.to(own.device)):
                predicts = target != IGNORE_INDEX
                # Row by row: in float64 the logits of a whole batch would take four times as much.
                log_q = own[row, predicts].double().log_softmax(-1)  # [n, vocabulary]
                if arm == 0:
                    intact.append(log_q[0].clone())
                log_p = intact[row]
                kl[arm, row] = (log_p.exp() * (log_p - log_q[0])).sum()
                log_prob[arm, row] = log_q.gather(1, target[predicts, None]).sum()
    return kl, log_prob
