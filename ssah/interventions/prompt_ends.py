"""Where prompts end in what passes through a model: at the tokens that a template puts there.

A batch may hold prompts alone, as when a model generates, or prompts and responses together, as
when a loss is computed. In both every prompt ends with the same tokens, here with E F:

    A B E F          ends at 3
    A E F G H        ends at 2; G H is the response
    A B C            has no prompt: -1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssah.interventions.positions import Prompts


@dataclass(frozen=True)
class PromptEnds:
    """The end of each prompt, for the `at` of a change of hidden states.

    Attributes:
        tokens: with which every prompt ends.
    """

    tokens: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> PromptEnds:
        """What prompts end with, as tokens: two of them with different requests.

        Raises:
            ValueError: they end differently.
        """
        shared = 0
        for tokens in zip(*(reversed(ids) for ids in prompts), strict=False):
            if len(set(tokens)) > 1:
                break
            shared += 1
        if not shared:
            raise ValueError(
                "prompts end with different tokens, so that their end cannot be found; there must "
                "be a chat template that puts something after a request"
            )
        return cls(tuple(prompts[0][-shared:]))

    def __call__(self, given: Prompts) -> Tensor:
        """The last token of each prompt, counted without padding; 0 without one: ``[rows]``."""
        counted = given.attended.cumsum(1) - 1  # [rows, tokens]
        return counted.gather(1, self.places(given).clamp(min=0)[:, None])[:, 0].clamp(min=0)

    def places(self, given: Prompts) -> Tensor:
        """The same, counted with padding, and -1 without a prompt: int64 ``[rows]``."""
        ids, n = given.input_ids, len(self.tokens)
        if ids.shape[1] < n:
            return ids.new_full((len(ids),), -1)
        windows = ids.unfold(1, n, 1)  # [rows, places, n]
        stands = (windows == torch.tensor(self.tokens, device=ids.device)).all(-1)
        ends = torch.arange(n - 1, ids.shape[1], device=ids.device)  # [places]
        # The last time: of several turns it is the last request that is answered.
        return torch.where(stands, ends, -1).amax(1)

    def prompts(self, given: Prompts) -> list[list[int]]:
        """The tokens of each prompt, without padding and response; none without a prompt."""
        rows = zip(given.input_ids, given.attended, self.places(given).tolist(), strict=True)
        return [ids[: end + 1][attended[: end + 1]].tolist() for ids, attended, end in rows]
