"""Length-bucketed, right-padded batches, and the fingerprint of what they hold.

Rows of 7, 2, 5 and 3 tokens in batches of two: rows 0 and 2, padded to 7, then rows 3 and 1, padded
to 3. That is 20 positions for 17 tokens; in the order of the rows it would be 24.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ssah.choices import Overlong
from ssah.data.counts import Counts
from ssah.data.encoding import IGNORE_INDEX, encode_checked
from ssah.data.fields import DataError, Row, check_count
from ssah.data.rows import RowStream, Source, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A stream is sorted by length within this many batches: what it holds in memory at a time.
_BUFFER_BATCHES = 64

Example = Mapping[str, Any]  # "input_ids" and "labels", [length] each
Bucketing = Callable[[Sequence[int], Random | None], list[list[int]]]  # lengths -> rows of batches


class Collator:
    """Pads encoded rows on the right to one batch; serves as `data_collator` of a Trainer.

    The padding is the tokenizer's pad token (its EOS, then 0, where it has none) in `input_ids`, 0
    in `attention_mask` and -100 in `labels`.

    Args:
        tokenizer: gives the pad token.
        pad_to_multiple_of: round the length of a batch up to a multiple of this.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None
    ) -> None:
        if pad_to_multiple_of is not None:
            check_count("pad_to_multiple_of", pad_to_multiple_of)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = next(token for token in candidates if token is not None)
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def width(self, length: int) -> int:
        """The padded length of a batch whose longest row has `length` tokens."""
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of  # rounded up

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Join rows with `input_ids` and `labels` (integers, `[length]` each) to one batch.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 `[len(examples), width]`.

        Raises:
            ValueError: a row's `input_ids` and `labels` differ in length.
        """
        width = self.width(max(len(example["input_ids"]) for example in examples))
        shape = (len(examples), width)
        # All padding at first; each row is written over its beginning.
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            if len(example["labels"]) != length:
                raise ValueError(
                    f"labels must be as long as input_ids ({length} tokens), "
                    f"was {len(example['labels'])} in row {row} of the batch"
                )
            input_ids[row, :length] = torch.as_tensor(example["input_ids"])
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.as_tensor(example["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class Loader(DataLoader[Any]):
    """Batches of encoded rows, re-iterable; made by `make_loader`.

    Each batch is a dict of int64 `[batch, length]` tensors: `input_ids`, `attention_mask` and
    `labels`. `len()` is the number of batches, a TypeError for a stream. With shuffling, each
    iteration has another order, and a new loader with the same seed repeats them.

    Attributes:
        counts: rows left out, rows cut; of a stream, those of the last pass.
    """

    counts: Counts

    @property
    def fingerprint(self) -> str | None:
        """What `fingerprint` gives for the encoded rows in the order of the source.

        Batch size, padding and shuffling do not change it. That of a stream is known after a
        complete pass, and None before.
        """
        digest: str | None = self.dataset.fingerprint  # type: ignore[attr-defined]
        return digest


def make_loader(
    rows_or_source: Source | RowStream[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int = 512,
    max_tokens_per_batch: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    pad_to_multiple_of: int | None = None,
    split: str | None = None,
    limit: int | None = None,
    overlong: Overlong = "cut",
    counts: Counts | None = None,
) -> Loader:
    """Encode rows and batch those of similar length together.

    The longest rows come first, so that a batch that does not fit in memory fails at once. A
    stream is encoded as it is read and bucketed within a buffer of 64 batches.

    Args:
        rows_or_source: rows, or anything that `load_rows` takes.
        tokenizer: a tokenizer of `transformers`.
        batch_size: the most rows in a batch.
        max_length: the most tokens of a row, see `encode`.
        max_tokens_per_batch: the most tokens in a batch, padding included; None sets no limit.
        shuffle: random order of the batches, and of rows of equal length, in each iteration.
        seed: of the shuffling.
        pad_to_multiple_of: round the length of every batch up to a multiple of this.
        split: see `load_rows`.
        limit: see `load_rows`.
        overlong: see `encode`.
        counts: what is left out and cut is counted here, `Loader.counts`; give the one that
            `load_rows` has counted in, to have all of it in one place.

    Raises:
        ValueError: an argument is out of range.
        DataError: a row is invalid, see `load_rows` and `encode`; for a stream, while iterating.
    """
    check_count("batch_size", batch_size)
    if max_tokens_per_batch is not None:
        check_count("max_tokens_per_batch", max_tokens_per_batch)
    collator = Collator(tokenizer, pad_to_multiple_of)
    if max_tokens_per_batch is not None and max_tokens_per_batch < collator.width(max_length):
        raise ValueError(
            "max_tokens_per_batch must hold one row of max_length tokens "
            f"({collator.width(max_length)} with padding), was {max_tokens_per_batch}"
        )

    def bucketing(lengths: Sequence[int], random: Random | None) -> list[list[int]]:
        return _bucket(lengths, collator.width, batch_size, max_tokens_per_batch, random)

    counts = Counts() if counts is None else counts
    if isinstance(rows_or_source, RowStream) and limit is None:
        rows: list[Row] | RowStream[Row] = rows_or_source
    else:
        rows = load_rows(rows_or_source, split, limit)

    def encoded() -> Iterator[dict[str, Tensor]]:
        for example in encode_checked(rows, tokenizer, max_length, overlong, counts):
            yield {key: torch.tensor(value) for key, value in example.items()}  # [length] each

    # A DataLoader without a generator of its own draws from the global one at every iteration.
    generator = torch.Generator()
    shuffle_seed = seed if shuffle else None
    if isinstance(rows, RowStream):
        stream = _BatchStream(encoded, bucketing, _BUFFER_BATCHES * batch_size, shuffle_seed)
        loader = Loader(stream, batch_size=None, collate_fn=collator, generator=generator)
    else:
        examples = _Examples(encoded())
        lengths = [len(example["input_ids"]) for example in examples.rows]
        sampler = _BucketSampler(lengths, bucketing, shuffle_seed)
        loader = Loader(examples, batch_sampler=sampler, collate_fn=collator, generator=generator)
    loader.counts = counts
    return loader


def fingerprint(examples: Iterable[Example]) -> str:
    """The sha256, in hexadecimal, of encoded rows: their tokens and labels, in this order.

    Each row enters as its number of tokens, its `input_ids` and its `labels`, all little-endian
    int64.
    """
    digest = hashlib.sha256()
    for example in examples:
        _update(digest, example)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, example: Example) -> None:
    for values in ([len(example["input_ids"])], example["input_ids"], example["labels"]):
        # Little-endian by name, so that the digest is the same on every machine.
        numbers = torch.as_tensor(values, dtype=torch.int64).numpy()
        digest.update(numbers.astype("<i8").tobytes())


def _bucket(
    lengths: Sequence[int],
    width: Callable[[int], int],
    batch_size: int,
    max_tokens: int | None,
    random: Random | None,
) -> list[list[int]]:
    """Indices of the rows of each batch, longest first; their number is the same for any order."""
    order = list(range(len(lengths)))
    if random is not None:
        random.shuffle(order)
    order.sort(key=lambda index: -lengths[index])  # stable: equal lengths stay shuffled
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if room == 0:
            batches.append([])
            room = batch_size
            if max_tokens is not None:  # the first row of a batch is its longest: all are as wide
                room = min(room, max_tokens // width(lengths[index]))
        batches[-1].append(index)
        room -= 1
    if random is not None:
        random.shuffle(batches)
    return batches


class _Examples(Dataset[dict[str, Tensor]]):
    """Encoded rows in memory."""

    def __init__(self, examples: Iterable[dict[str, Tensor]]) -> None:
        self.rows = list(examples)
        if not self.rows:
            raise DataError("rows: every prompt is overlong, so that no row is left")
        self.fingerprint = fingerprint(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class _BucketSampler(Sampler[list[int]]):
    """Batches of row indices; shuffled differently at each iteration where there is a seed."""

    def __init__(self, lengths: Sequence[int], bucketing: Bucketing, seed: int | None) -> None:
        self.lengths, self.bucketing, self.seed = lengths, bucketing, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.bucketing(self.lengths, None))

    def __iter__(self) -> Iterator[list[int]]:
        random = _epoch_random(self.seed, self.epoch)
        self.epoch += 1
        yield from self.bucketing(self.lengths, random)


class _BatchStream(IterableDataset[list[dict[str, Tensor]]]):
    """Batches of a stream of encoded rows, bucketed within a buffer."""

    def __init__(
        self,
        encoded: Callable[[], Iterator[dict[str, Tensor]]],
        bucketing: Bucketing,
        buffer_size: int,
        seed: int | None,
    ) -> None:
        self.encoded, self.bucketing = encoded, bucketing
        self.buffer_size, self.seed = buffer_size, seed
        self.epoch = 0
        self.fingerprint: str | None = None

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        random = _epoch_random(self.seed, self.epoch)
        self.epoch += 1
        self.fingerprint = None  # until the pass is complete: half of a stream has no fingerprint
        digest = hashlib.sha256()
        examples = self.encoded()
        while buffer := list(islice(examples, self.buffer_size)):
            for example in buffer:
                _update(digest, example)
            lengths = [len(example["input_ids"]) for example in buffer]
            for batch in self.bucketing(lengths, random):
                yield [buffer[index] for index in batch]
        self.fingerprint = digest.hexdigest()


def _epoch_random(seed: int | None, epoch: int) -> Random | None:
    # A text is hashed: seed 0 of epoch 1 and seed 1 of epoch 0 have nothing in common.
    return None if seed is None else Random(f"{seed}/{epoch}")
