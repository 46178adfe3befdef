"""Batches of `ssah.data`: their lengths, their order and their fingerprint."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter

import datasets
import pytest
import torch
from byte_level import CHATML, ROWS, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssah.data import (
    IGNORE_INDEX,
    Collator,
    DataError,
    encode,
    fingerprint,
    load_rows,
    make_loader,
)


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerFast:
    return make_tokenizer(CHATML)


def rows_in(batches) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The unpadded rows of some batches, in the order of the batches."""
    return [
        (tuple(ids[mask.bool()].tolist()), tuple(labels[mask.bool()].tolist()))
        for batch in batches
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


def test_collator_pads_on_the_right(chat):
    examples = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])},
    ]
    batch = Collator(chat, pad_to_multiple_of=4)(examples)
    pad = chat.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7, pad], [8, pad, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    no = IGNORE_INDEX
    assert batch["labels"].tolist() == [[no, 6, 7, no], [8, no, no, no]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert Collator(chat)(examples)["input_ids"].shape == (2, 3)
    with pytest.raises(ValueError, match="labels must be as long as input_ids"):
        Collator(chat)([{"input_ids": [1, 2], "labels": [1]}])


def test_collator_without_a_pad_token():
    tokenizer = make_tokenizer(CHATML)
    tokenizer.pad_token = None
    assert Collator(tokenizer).pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert Collator(tokenizer).pad_token_id == 0


def test_loader_buckets_by_length_and_iterates_again(chat):
    rows = load_rows("builtin:utility")
    loader = make_loader(rows, chat, batch_size=8)
    batches = list(loader)
    assert len(loader) == len(batches) == 20
    expected = [tuple(map(tuple, example.values())) for example in encode(rows, chat)]
    assert Counter(rows_in(batches)) == Counter(expected)
    lengths = [len(ids) for ids, _ in rows_in(batches)]
    assert lengths == sorted(lengths, reverse=True)
    assert rows_in(loader) == rows_in(batches)


def test_token_limit_counts_padding(chat):
    loader = make_loader(
        "builtin:utility", chat, max_tokens_per_batch=1024, batch_size=50, pad_to_multiple_of=16
    )
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(batch["input_ids"].numel() <= 1024 for batch in batches)
    assert all(batch["input_ids"].shape[1] % 16 == 0 for batch in batches)
    assert len(rows_in(batches)) == 160
    assert max(batch["input_ids"].shape[0] for batch in batches) > 8
    with pytest.raises(ValueError, match=r"max_tokens_per_batch must hold one row .*\(512"):
        make_loader(ROWS, chat, max_tokens_per_batch=511)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(64, 300),
    st.booleans(),
    st.booleans(),
)
def test_every_row_is_in_one_batch(lengths, batch_size, max_tokens, shuffle, stream):
    # A word is one token, so prompt, response and EOS give a row of length + 2 tokens.
    backend = Tokenizer(models.WordLevel({"?": 0, "w": 1, "</s>": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="?", eos_token="</s>", pad_token="</s>"
    )
    rows = [{"prompt": "w", "completion": "w " * length} for length in lengths]
    source = datasets.IterableDataset.from_generator(lambda: iter(rows)) if stream else rows
    loader = make_loader(
        source,
        tokenizer,
        batch_size=batch_size,
        max_length=64,
        max_tokens_per_batch=max_tokens,
        shuffle=shuffle,
    )
    batches = list(loader)
    assert sorted(len(ids) for ids, _ in rows_in(batches)) == sorted(n + 2 for n in lengths)
    assert all(batch["input_ids"].shape[0] <= batch_size for batch in batches)
    assert all(batch["input_ids"].numel() <= max_tokens for batch in batches)


def test_shuffling_repeats_with_the_seed(chat):
    def epochs(seed):
        loader = make_loader("builtin:safety", chat, batch_size=4, shuffle=True, seed=seed)
        first, second = rows_in(loader), rows_in(loader)
        assert len(list(loader)) == len(loader)
        return first, second

    first, second = epochs(0)
    assert first != second
    assert Counter(first) == Counter(second)
    assert epochs(0) == (first, second)
    assert epochs(1)[0] != first


def test_iterating_leaves_the_global_generator_alone(chat):
    before = torch.get_rng_state()
    list(make_loader(ROWS, chat, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprint_does_not_depend_on_batching(chat):
    rows = load_rows("builtin:safety")
    digest = hashlib.sha256()
    for example in encode(rows, chat):
        ids, labels = example["input_ids"], example["labels"]
        digest.update(struct.pack(f"<{2 * len(ids) + 1}q", len(ids), *ids, *labels))
    expected = digest.hexdigest()
    assert fingerprint(encode(rows, chat)) == expected
    for options in (
        {},
        {"batch_size": 3, "pad_to_multiple_of": 8},
        {"shuffle": True, "seed": 5},
        {"max_tokens_per_batch": 700},
    ):
        assert make_loader(rows, chat, **options).fingerprint == expected
    assert make_loader(rows, chat, limit=79).fingerprint != expected
    assert make_loader(rows, chat, max_length=60).fingerprint != expected


def test_stream_batches_and_fingerprint(chat):
    rows = load_rows("builtin:utility")
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    loader = make_loader(stream, chat, batch_size=2)  # 160 rows, buffers of 128
    finite = make_loader(rows, chat)
    assert loader.fingerprint is None
    with pytest.raises(TypeError):
        len(loader)
    batches = list(loader)
    assert Counter(rows_in(batches)) == Counter(rows_in(finite))
    assert loader.fingerprint == finite.fingerprint
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert lengths[:64] == sorted(lengths[:64], reverse=True)
    assert rows_in(loader) == rows_in(batches)
    next(iter(loader))
    assert loader.fingerprint is None


def test_no_row_left_is_an_error(chat):
    with pytest.raises(DataError, match="no row is left"):
        make_loader(ROWS, chat, max_length=4, overlong="skip")


def test_loader_arguments_are_checked(chat):
    with pytest.raises(ValueError, match="batch_size is 0, must be at least 1"):
        make_loader(ROWS, chat, batch_size=0)
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0, must be at least 1"):
        make_loader(ROWS, chat, pad_to_multiple_of=0)
