"""What the opening of a response does to prompts: how far hidden states move as it is added.

With h_l(e) what layer l puts out at the last token of a prompt, and h_l(s) at the last token of the
opening after it:

    t_l = h_l(e) - h_l(s)

Example: (3, 1) at the end of a request and (1, 1) at the end of "Sure" after it give (2, 0). A
token does not see what comes after it, so that one pass over both has both states.

Source: Cao et al., AAAI 2025, arXiv 2408.11491.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssah.data import IGNORE_INDEX, Collator
from ssah.representations.positions import Position
from ssah.representations.recording import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def opening_shifts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    opening: Sequence[int],
    *,
    batch_size: int = 8,
) -> Tensor:
    """How the opening of a response moves the hidden states of prompts.

    Args:
        model: as of `ssah.representations.hidden_states`.
        tokenizer: says what pads a row.
        prompts: as tokens.
        opening: as tokens.
        batch_size: prompts of a pass.

    Returns:
        float64 ``[prompts, layers, hidden]`` on the CPU. Errors as of `hidden_states`, and:

    Raises:
        ValueError: there is no prompt, or the opening has no token.
    """
    if not prompts or not opening:
        raise ValueError(
            f"prompts has {len(prompts)} and opening {len(opening)} tokens; both must have one at "
            "least"
        )
    collator = Collator(tokenizer)
    rows = [
        # The last token alone has a label: it is the one at which the second state is read.
        {
            "input_ids": [*ids, *opening],
            "labels": [IGNORE_INDEX] * (len(ids) + len(opening) - 1) + [opening[-1]],
        }
        for ids in prompts
    ]
    batches = (
        collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)
    )
    where: tuple[Position, ...] = (-len(opening), "first")  # counted from that label
    states = torch.cat(list(hidden_states(model, batches, positions=where)))
    return states[:, 0] - states[:, 1]
