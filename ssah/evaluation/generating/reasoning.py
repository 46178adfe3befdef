"""Answers of reasoning models: what is said follows the block of reasoning.

``<think>I cannot see why not.</think>Sure, step 1 ...`` says "Sure, step 1 ...". A block that is
not closed holds all of the answer: the model was cut off before it said anything.
"""

from __future__ import annotations

# How a block of reasoning opens, and what follows it. The last one: gpt-oss.
_BLOCKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


def spoken(text: str, *, opened: bool = False) -> str | None:
    """What an answer says after its reasoning; None where the reasoning does not end.

    Args:
        text: the answer. Without a block of reasoning it is returned as it is.
        opened: the generation prompt has opened the block already.
    """
    found = False
    for opening, closing in _BLOCKS:
        # The last end counts: a model may think, speak and think again.
        _, closed, after = text.rpartition(closing)
        if closed:
            text, opened, found = after, False, True
        if opening in text:  # after the last end, or without any: cut off in there
            return None
    if opened:
        return None
    return text.strip() if found else text


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends inside a block of reasoning: its answer begins in there."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in _BLOCKS))
