"""Log-probabilities of continuations: a prompt is run once, however many continuations it has.

    log p(c | x) = sum over tokens t of c of log p(c_t | x, c_<t)

The prompt x = "a b c" has the continuations "d e" and "f", as the answers of two arms to one
request. Its cache is made of "a b", and then two rows go on from it:

    cache   a b | c d     the logits at c predict d, those at d predict e
            a b | c .     the logits at c predict f; padding (.) predicts nothing
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.data import IGNORE_INDEX, Encoded
from ssah.evaluation.generating import greedy, longest_first, prefilled
from ssah.evaluation.measures.logits import logits_at, summed_log_prob
from ssah.evaluation.measures.loss import log_probs_by_length
from ssah.models import as_it_was, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continuation_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
) -> Tensor:
    """Summed log-probability of the tokens of each continuation after its prompt.

    Args:
        model: a causal language model of transformers; it is left as it was.
        tokenizer: the model's.
        prompts: as tokens, one for each continuation; equal ones are run once.
        continuations: as tokens, at least one each.
        batch_size: continuations run at a time.

    Returns:
        float64 ``[continuations]`` on the CPU, nats.

    Raises:
        FloatingPointError: the model's log-probabilities are not finite.
    """
    found = torch.zeros(len(prompts), dtype=torch.float64)
    # Equal prompts are neighbours of one batch, where it has room for all of them.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), list(prompts[i])))
    for chunk in longest_first([prompts[i] for i in order], batch_size):
        own = [order[k] for k in chunk]
        pairs = [(list(prompts[i]), list(continuations[i])) for i in own]
        log_probs = None
        if len({tuple(prompt) for prompt, _ in pairs}) < len(pairs):
            log_probs = _from_cache(check_whole(model), tokenizer, pairs)
        found[own] = _plainly(model, tokenizer, pairs) if log_probs is None else log_probs
    return found


def _plainly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
) -> Tensor:
    """Float64 ``[pairs]``: each prompt with its continuation is a row."""
    examples: list[Encoded] = [
        {"input_ids": prompt + ids, "labels": [IGNORE_INDEX] * len(prompt) + ids}
        for prompt, ids in pairs
    ]
    found = torch.zeros(len(pairs), dtype=torch.float64)
    for chunk, log_probs, _ in log_probs_by_length(model, tokenizer, examples, len(pairs)):
        found[chunk] = log_probs
    return found


def _from_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
) -> Tensor | None:
    """Float64 ``[pairs]``: rows go on from the cache of their prompt; None: it does not serve."""
    # The last token of a prompt stays out: its logits predict the first of the continuation.
    prompts = list(dict.fromkeys(tuple(prompt[:-1]) for prompt, _ in pairs))
    if not all(prompts):
        return None
    with as_it_was(model), torch.inference_mode(), greedy(model, tokenizer, [], 1):
        begun = prefilled(model, prompts)
        if begun is None:
            return None
        mask, past = begun  # [prompts, width]
        number = {prompt: index for index, prompt in enumerate(prompts)}
        index = torch.tensor([number[tuple(prompt[:-1])] for prompt, _ in pairs])  # [pairs]
        for cache in past.values():
            cache.reorder_cache(index)
        width = max(1, *(len(ids) for _, ids in pairs))  # a text may be no token at all
        rows = [[prompt[-1], *ids[:-1]] for prompt, ids in pairs]
        new = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=mask.device)
        mask = torch.cat([mask[index.to(mask.device)], torch.ones_like(new)], dim=1)
        options: dict[str, Any] = dict(past)
        if "position_ids" in inspect.signature(model.forward).parameters:
            # Counted without padding, which stands between prompts of different lengths.
            options["position_ids"] = (mask.cumsum(1) - 1)[:, -width:]
        lengths = torch.tensor([len(ids) for _, ids in pairs])
        predicts = torch.arange(width) < lengths[:, None]  # [pairs, width]
        inputs = {"input_ids": new, "attention_mask": mask, "use_cache": True, **options}
        logits = logits_at(model, inputs, predicts)  # [n, vocabulary]
        found = torch.zeros(len(pairs), dtype=torch.float64)
        for row, (own, (_, ids)) in enumerate(
            zip(logits.split(lengths.tolist()), pairs, strict=True)
        ):
            found[row] = summed_log_prob(own, torch.tensor(ids))
        if not bool(found.isfinite().all()):
            raise FloatingPointError("log-probabilities of continuations are NaN or infinite")
    return found
