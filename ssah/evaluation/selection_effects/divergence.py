"""How far a model is from the intact one on harmless prompts: the KL divergence of its predictions.

With p the intact model's distribution of the next token at a position, and q the other model's:

    KL(p || q) = sum over tokens v of p(v) (log p(v) - log q(v))         nats; 0: the same there

Example: p = (0.5, 0.5) and q = (0.25, 0.75) have a KL of 0.5 log 2 + 0.5 log(2/3) = 0.144 nats.
It sees every change of what is said to ordinary people, where a loss sees that of one answer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.attribution import Batch, BatchReader
from ssah.data import IGNORE_INDEX
from ssah.evaluation.measures import Predictions, logits_at, summed_log_prob
from ssah.interventions import ablate, arms, split_arms
from ssah.models import as_it_was, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.selections import Selection
    from ssah.units import UnitSet


@dataclass(frozen=True, eq=False)
class Divergence:
    """KL(intact || other) of one model, row by row in the order of the loader; nats, float64.

    Attributes:
        total: ``[rows]``, summed over the positions that predict a token of the response.
        tokens: int64 ``[rows]``, how many these are.
        first: ``[rows]``, at the first of them: the first token that the model is free to choose
            after the chat template.
        log_prob: ``[rows]``, of the whole response by the other model, which the same pass gives.
    """

    total: Tensor
    tokens: Tensor
    first: Tensor
    log_prob: Tensor

    @property
    def per_row(self) -> Tensor:
        """``[rows]``, whose mean is the mean over all positions: a row's sum / mean tokens."""
        return self.total / self.tokens.double().mean()


def divergences(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    selections: Sequence[UnitSet | Selection | None],
    *,
    intact: PreTrainedModel | None = None,
) -> list[Divergence]:
    """KL divergence from the intact model of a model without units, for several selections.

    Args:
        model: a causal language model of transformers; it is left as it was.
        loader: batches with ``input_ids`` and ``labels``, of ``ssah.data.make_loader`` for one:
            harmless prompts with answers.
        selections: what is out, as `ssah.ablate` takes it; None: the model as it is.
        intact: the model to compare with, of the same vocabulary; None: ``model`` as it is.

    Returns:
        One a selection. The logits of two models are in memory at a time, of one batch.

    Raises:
        TypeError, ValueError: a batch is not of this form, a row has no response token, there is no
            batch, or the vocabularies differ.
        FloatingPointError: a divergence is NaN or infinite.
    """
    reader = BatchReader(check_whole(model), tokens="labels")
    found: list[list[tuple[float, ...]]] = [[] for _ in selections]
    of_intact = Predictions(model if intact is None else intact)
    of_arm = [Predictions(model) for _ in selections]
    units, alone = split_arms(model, selections)
    for number, raw in enumerate(loader):
        batch = reader.read(raw, number)
        predicts = _predicting(batch, number)  # [rows, length]
        counts = predicts.sum(1).tolist()
        targets = batch.targets[predicts].split(counts)  # of each row [its positions]
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(as_it_was(model))
            run = None
            # The model as it is needs no arms, and may be one whose units we do not know.
            if any(own is not None for own in units):
                run = stack.enter_context(arms(model, [None, *units]))
                run.assign(0)
            if intact is not None:
                stack.enter_context(as_it_was(intact))
            exact = of_intact(batch.inputs, predicts).split(counts)  # of each row [n, vocabulary]
            for arm, own in enumerate(found):
                if run is not None:
                    run.assign(1 + arm)
                if intact is None and selections[arm] is None:
                    logits = exact
                else:
                    with ablate(model, alone[arm]) if arm in alone else nullcontext():
                        logits = of_arm[arm](batch.inputs, predicts).split(counts)
                own += map(_of_row, exact, logits, targets)
    if not any(found):
        raise ValueError("loader is empty, must have at least one batch")
    return [_joined(own) for own in found]


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, ``[...]``, of log-probabilities ``[..., vocabulary]``."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _of_row(p: Tensor, q: Tensor, targets: Tensor) -> tuple[float, int, float, float]:
    """The sum, the number of positions, the first, and the log-probability of ``targets``.

    ``p``, ``q``: logits ``[n, vocabulary]``; ``targets``: int64 ``[n]``, what is said.
    """
    if p.shape != q.shape:
        raise ValueError(
            f"intact predicts {p.shape[-1]} tokens and model {q.shape[-1]}, must be of the same "
            "vocabulary"
        )
    # Row by row: in float64 the logits of a whole batch would take four times as much.
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = kl_divergence(log_p, log_q.to(log_p.device))  # [n]
    # As every other loss is computed: in float32 a sum over a large vocabulary lacks 1e-5 of nats.
    return float(kl.sum()), len(kl), float(kl[0]), summed_log_prob(q, targets)


def _joined(rows: Sequence[tuple[float, ...]]) -> Divergence:
    total, tokens, first, log_prob = zip(*rows, strict=True)
    found = Divergence(
        torch.tensor(total, dtype=torch.float64),
        torch.tensor(tokens),
        torch.tensor(first, dtype=torch.float64),
        torch.tensor(log_prob, dtype=torch.float64),
    )
    if not all(bool(each.isfinite().all()) for each in vars(found).values()):
        raise FloatingPointError("KL is NaN or infinite: so are a model's logits somewhere")
    return found


def next_token_log_probs(model: PreTrainedModel, loader: Iterable[Mapping[str, Any]]) -> Tensor:
    """Log-probabilities of the first token of the response, of all rows.

    Interventions that are under way count. Memory: as many numbers as the vocabulary has, a row.

    Args:
        model: a causal language model of transformers; it is left as it was.
        loader: as of `divergences`.

    Returns:
        float64 ``[rows, vocabulary]`` on the CPU, in nats.

    Raises:
        TypeError, ValueError: as of `divergences`.
        FloatingPointError: logits are NaN or infinite.
    """
    reader = BatchReader(check_whole(model), tokens="labels")
    found = []
    for number, raw in enumerate(loader):
        batch = reader.read(raw, number)
        predicts = _predicting(batch, number)
        first = predicts & (predicts.cumsum(1) == 1)  # [rows, length], one of each row
        with torch.inference_mode(), as_it_was(model):
            asked = batch.up_to(int(first.any(0).nonzero().max()) + 1)  # without the responses
            wanted = first[:, : asked.input_ids.shape[1]]
            logits = logits_at(model, asked.inputs, wanted)  # [rows, vocabulary]
        found.append(logits.double().log_softmax(-1).cpu())
    if not found:
        raise ValueError("loader is empty, must have at least one batch")
    every = torch.cat(found)
    if not bool(every.isfinite().all()):
        raise FloatingPointError("logits of the model are NaN or infinite")
    return every


def _predicting(batch: Batch, number: int) -> Tensor:
    """Which positions predict a token of the response: bool ``[rows, length]``.

    Raises:
        ValueError: a row has none.
    """
    predicts = batch.targets != IGNORE_INDEX
    if not bool(predicts.any(1).all()):
        raise ValueError(
            f"batch {number} has a row without a response token, must have one in each "
            "(labels other than -100 after the prompt)"
        )
    return predicts
