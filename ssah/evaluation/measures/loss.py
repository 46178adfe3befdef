"""Log-probabilities of responses, and the utility loss made of them.

    utility loss = - 1/n sum over rows, sum over response tokens t of log p(t | what stands before)

n counts the response tokens of all rows. Two rows whose responses have 1 and 3 tokens, with
log-probabilities of -2 and of -1, -1, -1, have a loss of 5/4 nats: the mean of tokens, not of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.attribution import Batch, BatchReader
from ssah.data import IGNORE_INDEX, Collator, Encoded
from ssah.evaluation.generating import longest_first
from ssah.evaluation.measures.logits import Predictions, summed_log_prob
from ssah.models import as_it_was, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def utility_loss(model: PreTrainedModel, loader: Iterable[Mapping[str, Any]]) -> float:
    """Mean negative log-likelihood of a response token, in nats.

    The mean is over all response tokens of the loader (labels other than -100), so that neither
    the batching nor the padding changes it. Lower is better; exp of it is the perplexity.

    Args:
        model: a causal language model of transformers; it is left as it was.
        loader: batches with ``input_ids`` and ``labels``, of ``ssah.data.make_loader`` for one.

    Raises:
        ValueError: the loader is empty, or has no label to predict.
        FloatingPointError: the model's log-probabilities are not finite.
    """
    total, count = 0.0, 0
    for log_probs, tokens in response_log_probs(model, loader):
        total += float(log_probs.sum())
        count += int(tokens.sum())
    if count == 0:
        raise ValueError("loader has no response token to predict, must have at least one")
    return -total / count


def response_log_probs(
    model: PreTrainedModel, loader: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For every batch: summed log-probability and number of the response tokens of each row.

    Logits are computed for positions that predict a response token alone, and what rows begin with
    alike is run once (:class:`Predictions`). The model runs in evaluation mode, and its mask is
    dropped where right padding makes it superfluous.

    Args:
        model: a causal language model of transformers; it is left as it was.
        loader: batches with ``input_ids`` and ``labels``, and ``attention_mask`` where padded.

    Yields:
        float64 ``[rows]`` in nats, and int64 ``[rows]``, on the CPU.

    Raises:
        TypeError, ValueError: a batch is not of this form; the model wraps another one, or does
            not hold its weights.
        FloatingPointError: the model's log-probabilities are not finite.
    """
    reader = BatchReader(check_whole(model), tokens="labels")
    predictions = Predictions(model)
    for number, raw in enumerate(loader):
        batch = reader.read(raw, number)  # positions count from the first token of a row
        with as_it_was(model), torch.inference_mode():
            log_probs, count = _batch_log_probs(predictions, batch)
            if not bool(log_probs.isfinite().all()):
                raise FloatingPointError(f"log-probabilities of batch {number} are NaN or infinite")
        yield log_probs, count


def log_probs_by_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Encoded],
    batch_size: int,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """:func:`response_log_probs` of examples, those of similar length together.

    Yields:
        Of each batch: the indices of its examples, and what :func:`response_log_probs` yields,
        ``[rows]`` both.
    """
    collator = Collator(tokenizer)
    chunks = longest_first([example["input_ids"] for example in examples], batch_size)
    batches = (collator([examples[i] for i in chunk]) for chunk in chunks)
    for chunk, (log_probs, count) in zip(chunks, response_log_probs(model, batches), strict=True):
        yield chunk, log_probs, count


def _batch_log_probs(predictions: Predictions, batch: Batch) -> tuple[Tensor, Tensor]:
    targets = batch.targets  # [rows, length]: the token that each position is to predict
    predicts = targets != IGNORE_INDEX
    count = predicts.sum(1)  # [rows]
    log_probs = torch.zeros(len(targets), dtype=torch.float64)
    if not int(count.sum()):
        return log_probs, count.cpu()
    logits = predictions(batch.inputs, predicts)  # [n, vocabulary], row after row
    pairs = zip(logits.split(count.tolist()), targets[predicts].split(count.tolist()), strict=True)
    for row, (own, wanted) in enumerate(pairs):
        log_probs[row] = summed_log_prob(own, wanted)
    return log_probs, count.cpu()
