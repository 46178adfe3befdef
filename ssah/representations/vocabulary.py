"""What a direction says in tokens: the model's final norm and head applied to it (logit lens).

    logits = head(norm(d))          d [hidden], logits [vocabulary]

Example: with the head ((1, 0), (0, 1), (1, 1)) and no norm, d = (2, -1) gives (2, -1, 1): it speaks
for the first token. A norm takes the length of d out. A bias of norm or head stays in.

Architectures name norm and head differently, and scale or cap logits. So the model itself runs, on
one token a direction, and its last layer puts out the direction.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssah.data import check_count
from ssah.interventions import ReplaceHidden, intervene
from ssah.models import as_it_was, check_whole, device_of, text_config
from ssah.representations.recording import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def vocabulary_projection(model: PreTrainedModel, directions: Tensor) -> Tensor:
    """The logits that a causal language model makes of directions in its last hidden state.

    Args:
        model: it is left as it was.
        directions: ``[hidden]`` or ``[n, hidden]``, such as those of all layers.

    Returns:
        float64 ``[vocabulary]`` or ``[n, vocabulary]``, on the CPU.

    Raises:
        TypeError: ``model`` is no transformers model.
        ValueError: ``directions`` is of another size, or NaN or infinite.
    """
    hidden = text_config(check_whole(model)).hidden_size
    if directions.dim() not in (1, 2) or directions.shape[-1] != hidden or not len(directions):
        raise ValueError(
            f"directions is {list(directions.shape)}; it must be [{hidden}] or [n, {hidden}]"
        )
    rows = directions.reshape(-1, 1, hidden)  # [n, one token, hidden]
    ids = torch.zeros(
        len(rows), 1, dtype=torch.int64, device=device_of(model.get_input_embeddings())
    )
    last = len(layers_of(model)) - 1
    changed = intervene(model, ReplaceHidden(last, rows[None]))  # [one layer, n, one token, hidden]
    with as_it_was(model), torch.inference_mode(), changed:
        logits = model(input_ids=ids, use_cache=False).logits  # [n, one token, vocabulary]
    found = logits[:, 0].double().cpu()
    return found.clone()[0] if directions.dim() == 1 else found.clone()


def token_contrast(
    model: PreTrainedModel, directions: Tensor, tokens: Sequence[int], others: Sequence[int]
) -> Tensor:
    """How much rather directions speak for some tokens than for others.

    The mean logit of ``tokens`` less that of ``others``, over the standard deviation of the
    direction's logits: so directions of all layers can be compared.

    Args:
        model: a causal language model.
        directions: ``[n, hidden]``.
        tokens, others: ids; one that is there twice counts twice.

    Returns:
        float64 ``[n]``. Errors as of `vocabulary_projection`.
    """
    logits = vocabulary_projection(model, directions)  # [n, vocabulary]
    means = [logits[:, list(each)].mean(1) for each in (tokens, others)]
    return (means[0] - means[1]) / logits.std(1)


def top_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directions: Tensor, k: int = 10
) -> list[list[str]]:
    """The tokens that directions speak for most, the first one most of all.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        directions: ``[n, hidden]``, one or several.
        k: how many tokens of each.

    Returns:
        Of each direction k tokens as text.

    Raises:
        ValueError: as of `vocabulary_projection`; ``k`` is below 1.
    """
    check_count("k", k)
    logits = vocabulary_projection(model, directions)
    logits = logits.reshape(-1, logits.shape[-1])  # [n, vocabulary]
    return [[str(tokenizer.decode([i])) for i in each] for each in logits.topk(k).indices.tolist()]
