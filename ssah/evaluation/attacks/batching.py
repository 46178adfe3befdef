"""How many tokens of shared batches are those that a model says by itself, one request at a time.

The sum of a matrix product is taken in another order when a batch has another size. In float32 the
likeliest token is the same one. In 16 bits two tokens are often equally likely up to rounding, and
after the first other token an answer goes another way:

    alone      I  can  not  help  with  that         4 of 6 tokens are identical
    together   I  can  not  help  anyone  who
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ssah.evaluation.generating import Request, answer_tokens, answers_of_arms, prompts
from ssah.interventions import ablate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.selections import Selection
    from ssah.units import UnitSet


def identical_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    selections: Sequence[UnitSet | Selection | None],
    *,
    max_new_tokens: int,
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """Answer requests under all arms in one batch, and again one by one; the answers are not kept.

    Args:
        model: a causal language model of transformers; it is left as it was.
        tokenizer: the model's.
        requests: a few: each answer alone takes as long as a large batch.
        selections: of each arm what is out, as `ssah.ablate` takes it; None: nothing.
        max_new_tokens, system_prompt: as :func:`ssah.evaluation.generate` takes them.

    Returns:
        ``share``: fraction of the tokens said alone that stand at the same place of the answer in
        the batch; ``tokens``: how many were said alone; ``requests``: of each arm.

    Raises:
        ValueError, FloatingPointError: as of :func:`ssah.evaluation.generate`.
    """
    encoded = prompts(tokenizer, requests, system_prompt=system_prompt)
    jobs = [(arm, i) for arm in range(len(selections)) for i in range(len(encoded))]
    together = answers_of_arms(
        model,
        tokenizer,
        encoded,
        jobs,
        selections,
        max_new_tokens=max_new_tokens,
        at_once=len(jobs),
    )
    same = tokens = 0
    for (arm, i), answer in zip(jobs, together, strict=True):
        what = selections[arm]
        with nullcontext() if what is None else ablate(model, what):
            (alone,) = answer_tokens(
                model, tokenizer, [encoded[i]], max_new_tokens=max_new_tokens, batch_size=1
            )
        same += sum(a == b for a, b in zip(answer.said[0], alone.said[0], strict=False))
        tokens += alone.tokens
    return {"share": same / max(1, tokens), "tokens": tokens, "requests": len(encoded)}
