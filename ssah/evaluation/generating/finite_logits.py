"""What is looked at in the logits of each step while a model generates.

Example: one weight that is NaN makes every logit NaN. Greedy decoding would then take token 0 again
and again, and a judge would find no refusal in it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Finite:
    """Notices logits that are NaN or +inf while a model generates; waits for no device.

    Attributes:
        rows: rows of the batch, int64 ``[n]``, of which `said` is wanted; None: of none.
        said: of each step the log-probability of the token that each of them takes, ``[n]``.
    """

    def __init__(self) -> None:
        self.bad: Tensor | None = None
        self.rows: Tensor | None = None
        self.said: list[Tensor] = []

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:  # [rows, vocab_size]
        largest = self.see(logits)
        if self.rows is not None:
            rows = self.rows.to(logits.device)
            # Greedy decoding takes the largest.
            self.said.append(largest[rows].float() - logits[rows].float().logsumexp(-1))  # [n]
        return logits

    def see(self, logits: Tensor) -> Tensor:
        """Look at logits ``[..., vocab_size]``; the largest of each position is returned."""
        # The largest is NaN if any is. -inf is how transformers forbids a token.
        largest = logits.amax(-1)
        bad = (largest.isnan() | (largest == torch.inf)).any()
        self.bad = bad if self.bad is None else self.bad | bad
        return largest

    def check(self) -> None:
        """Raise FloatingPointError if there were such logits: now the device is waited for."""
        if self.bad is not None and bool(self.bad):
            raise FloatingPointError(
                "the model's logits are NaN or infinite, so that it says nothing: an empty answer "
                "would count as a refusal or not by chance. Look at its weights, or use bfloat16 "
                "or float32 in place of float16"
            )
