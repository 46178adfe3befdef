"""Perplexity per token and per word, of answers or of plain texts.

A text of ten tokens, 0 to 9, in windows of at most four (b: what begins a text, not predicted):

    b 0 1 2  |  2 3 4 5  |  5 6 7 8  |  8 9

The first of each window is given, the others are predicted: each token of the text once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssah.data import IGNORE_INDEX, Encoded, Encoder, check_count, encode
from ssah.evaluation.generating import check_list
from ssah.evaluation.measures import log_probs_by_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """How surprising texts are to a model.

    Attributes:
        nats: negative log-likelihood, summed over tokens.
        tokens: that were predicted; of an answer, the end of the turn counts.
        words: in the texts predicted: what white space separates.
    """

    nats: float
    tokens: int
    words: int

    @property
    def per_token(self) -> float:
        """exp(nats / tokens). It depends on the tokenizer: compare models that share one."""
        return _exp(self.nats / self.tokens)

    @property
    def per_word(self) -> float:
        """exp(nats / words), which models with different tokenizers can be compared by."""
        return _exp(self.nats / self.words)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON: a perplexity too large for a number is None."""
        values = {"token_perplexity": self.per_token, "word_perplexity": self.per_word}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        loss = self.nats / self.tokens
        return {"loss": loss, **finite, "tokens": self.tokens, "words": self.words}


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Iterable[str | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> Perplexity:
    """Perplexity of the answers of rows, or of plain texts.

    A text is cut into windows of ``max_length`` tokens. Every token is predicted once: the first
    of a text from the tokenizer's BOS token (its EOS where it has none), the first of a later
    window from the token before it.

    Args:
        model: a causal language model of transformers; it is left as it was.
        tokenizer: the model's.
        data: rows as ``ssah.data.load_rows`` returns them (the end of a response beyond
            ``max_length`` is cut off), or strings, each a text of its own.
        batch_size: sequences run at a time, those of similar length together.
        max_length: the most tokens of a sequence.

    Raises:
        ValueError: no data, a text without words, strings mixed with rows, or an argument out of
            range.
        FloatingPointError: the model's log-probabilities are not finite.
    """
    check_count("max_length", max_length, least=2)
    check_list("data", data)
    given = list(data)
    if not given:
        raise ValueError("data is empty, must have at least one row or text")
    texts = [item for item in given if isinstance(item, str)]  # the others are rows
    if texts and len(texts) < len(given):
        raise ValueError("data has both strings and rows, must have one kind")
    if texts:
        examples = list(_windows(texts, tokenizer, max_length))
        words = sum(len(text.split()) for text in texts)
    else:
        # Words of what is predicted: the end of a response may have been cut off.
        rows = [item for item in given if not isinstance(item, str)]
        examples = list(encode(rows, tokenizer, max_length=max_length))
        words = count_words((example["labels"] for example in examples), tokenizer)
    if words == 0:
        raise ValueError("data has no word to predict, must have at least one")
    nats, tokens = 0.0, 0
    for _, log_probs, count in log_probs_by_length(model, tokenizer, examples, batch_size):
        nats -= float(log_probs.sum())
        tokens += int(count.sum())
    return Perplexity(nats, tokens, words)


def _windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Encoded]:
    encoder = Encoder(tokenizer)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("tokenizer has neither BOS nor EOS token, must have one to start a text")
    step = max_length - 1  # one place is taken by the token that is given
    for text in texts:
        ids = encoder.tokenize(text)
        for start in range(0, len(ids), step):
            window = ids[start : start + step]
            before = ids[start - 1] if start else first
            yield {"input_ids": [before, *window], "labels": [IGNORE_INDEX, *window]}


def count_words(labels: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Words, which white space separates, in the responses that labels (one list a row) hold."""
    responses = ([label for label in row if label != IGNORE_INDEX] for row in labels)
    texts = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in responses)
    return sum(len(text.split()) for text in texts)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # beyond 1.8e308, which a damaged model may reach per word
        return math.inf
