"""Greedy tokens of many rows, each under an arm of its own: what is alike is run once.

Three prompts that begin alike (b), as prompts under one chat template do. The beginning is run
once an arm. The rest of each prompt (p) is padded on its left (.), so that every row goes on at the
same column, and tokens (n) are generated in stretches until each row ends its turn (E):

    b b b . . p p | n n E
    b b b p p p p | n n n n | n E
    b b b . p p p | n E                 input_ids, attention_mask: [rows, width]

Between stretches the rows that have ended leave the batch, and what is kept of them leaves the
cache. A step costs as much as the rows in it, or as reading the weights, whichever takes longer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.evaluation.generating.caches import SHARED, cache_of, is_plain
from ssah.evaluation.generating.finite_logits import Finite
from ssah.interventions import changes_some_positions
from ssah.models import device_of, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.interventions import Arms

_STRETCH = 8  # tokens between two looks at which rows have ended
_MOST_ROWS = 128  # more of them make no processor that we know faster
_MEMINFO = Path("/proc/meminfo")


@contextmanager
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    max_new_tokens: int,
) -> Iterator[None]:
    """Settings of greedy decoding in place of the model's own: sampling and penalties that came
    with the model would be merged into whatever is passed to its ``generate``."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    own = model.generation_config
    # A model without a padding token gets a token that ends its turn: the mask hides it anyway.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else (stops or [0])[0],
        bos_token_id=tokenizer.bos_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own


def left_padded(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], shared: int = 0
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of prompts, int64 ``[rows, width]`` each.

    The padding stands behind the first ``shared`` tokens, which are the same in all rows.
    """
    width = max(map(len, rows))
    pad = model.generation_config.pad_token_id
    # Not that of its weight: a plan may have split it, and one that is offloaded is on no device.
    device = device_of(model.get_input_embeddings())
    gaps = [width - len(row) for row in rows]
    ids = [
        [*row[:shared], *[pad] * gap, *row[shared:]] for row, gap in zip(rows, gaps, strict=True)
    ]
    mask = [[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def decode(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    stops: Sequence[int],
    max_new_tokens: int,
    run: Arms | None = None,
    arm: Sequence[int] = (),
    log_probs: dict[int, list[float]] | None = None,
) -> list[list[int]]:
    """The tokens that follow each row, up to the one that ends it, which is the last of them.

    To be called inside :func:`greedy` of the model.

    Args:
        model: a causal language model of transformers.
        rows: prompts, as tokens.
        stops: tokens that end a row.
        max_new_tokens: the most tokens of a row.
        run, arm: inside ``ssah.arms``, what it yielded, and the arm of each row.
        log_probs: of each row that is a key, the log-probabilities of its tokens are added.

    Raises:
        FloatingPointError: the model's logits are NaN or infinite.
    """
    arms = torch.tensor(list(arm) if run is not None else [0] * len(rows))  # [rows]
    with torch.inference_mode():
        given, past = _begun(model, rows, run, arms)
        new: list[list[int]] = [[] for _ in rows]
        finite = Finite()
        # Rows that are told apart stay together until all have ended.
        longest = max_new_tokens if changes_some_positions(model) else _STRETCH
        alive, left = torch.arange(len(rows)), max_new_tokens
        log_probs = log_probs or {}
        wanted = torch.tensor([row in log_probs for row in range(len(rows))])
        ends = torch.tensor(list(stops), dtype=torch.int64, device=given["input_ids"].device)
        while True:
            if run is not None:
                run.assign(arms[alive])
            finite.rows, finite.said = (wanted[alive].nonzero()[:, 0] if log_probs else None), []
            output = _stretch(model, given, past, min(longest, left), finite)
            width = given["input_ids"].shape[1]
            fresh = output.sequences[:, width:]  # [alive, tokens of this stretch]
            ended = torch.isin(fresh, ends)
            # What follows the end of a row is padding.
            lengths = ((ended.cumsum(1) - ended.long()) == 0).sum(1).tolist()
            for row, ids, length in zip(alive.tolist(), fresh.tolist(), lengths, strict=True):
                new[row] += ids[:length]
            if finite.rows is not None:
                said = torch.stack(finite.said, 1).tolist()  # [wanted rows][tokens of this stretch]
                for i, own in zip(finite.rows.tolist(), said, strict=True):
                    log_probs[int(alive[i])] += own[: lengths[i]]
            left -= fresh.shape[1]
            going = (~ended.any(1)).nonzero()[:, 0]  # [rows that go on]
            if left <= 0 or not len(going):
                break
            past = cache_of(output)
            if len(going) < len(alive):
                alive = alive[going.cpu()]
                for cache in past.values():
                    cache.reorder_cache(going)
            mask = torch.cat([given["attention_mask"], torch.ones_like(fresh)], dim=1)
            given = {"input_ids": output.sequences[going], "attention_mask": mask[going]}
    finite.check()
    return new


def prefilled(
    model: PreTrainedModel, rows: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, Any]] | None:
    """Attention mask, int64 ``[rows, width]``, and the cache of prompts, a row each, by its name.

    None where a cache is no plain list of keys and values: with a window or a running state, more
    tokens at once than one are not what the model computes without a cache; nor where positions
    are changed. To be called inside :func:`greedy` of the model.
    """
    if changes_some_positions(model):
        return None
    with torch.inference_mode():
        given, past = _begun(model, rows, None, torch.zeros(len(rows), dtype=torch.int64))
        past = cache_of(_stretch(model, given, past, 1, Finite()))
    return (given["attention_mask"], past) if is_plain(past) else None


def _stretch(
    model: PreTrainedModel,
    given: dict[str, Tensor],
    past: dict[str, Any],
    tokens: int,
    finite: Finite,
) -> Any:
    """At most so many tokens more, as ``generate`` returns them with its cache.

    ``given``: ``[rows, width]`` each; ``past``: what :func:`cache_of` returned, or nothing.
    """
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # Else it is 1, a slice: a strided matrix, for which torch copies the vocabulary
        # projection once a row. An index gives a whole one: prefilling takes half the time.
        options["logits_to_keep"] = torch.tensor([-1], device=given["input_ids"].device)
    generator: Any = model  # the types of its generate are of no use
    return generator.generate(
        **given,
        **past,
        **options,
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        logits_processor=[finite],
    )


def _begun(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], run: Arms | None, arms: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The rows, padded, and a cache of what they have in common; none where that is not exact.

    ``arms``: int64 ``[rows]``.
    """
    alike = (len(set(tokens)) == 1 for tokens in zip(*rows, strict=False))
    shared = sum(1 for _ in takewhile(bool, alike))
    shared = min(shared, min(map(len, rows)) - 1)  # each row has to be asked for its next token
    own, inverse = arms.unique(return_inverse=True)  # [arms in use], [rows]
    if shared >= SHARED and len(own) < len(rows) and not changes_some_positions(model):
        if run is not None:
            run.assign(own)
        begun = left_padded(model, [rows[0][:shared]] * len(own))
        past = cache_of(_stretch(model, begun, {}, 1, Finite()))
        if is_plain(past):  # padding behind the beginning would count in a window
            for cache in past.values():
                cache.reorder_cache(inverse)
            return left_padded(model, rows, shared), past
    return left_padded(model, rows), {}


def rows_at_once(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], max_new_tokens: int, least: int
) -> int:
    """How many rows to generate at a time: as many as half of the free memory holds.

    What a row takes is measured, with the cache and the logits of one of them. To be called inside
    :func:`greedy` of the model.

    Args:
        model, max_new_tokens: as :func:`decode` takes them.
        rows: all that will be asked for.
        least: the fewest, whatever the memory is; also where nobody tells how much is free.
    """
    longest = max(rows, key=len)
    given = left_padded(model, [longest])
    free = _free_bytes(given["input_ids"].device)
    if free is None:
        return least
    with torch.inference_mode():
        past = cache_of(_stretch(model, given, {}, 1, Finite()))
    tensors = [
        each
        for cache in past.values()
        for layer in getattr(cache, "layers", ())
        for each in vars(layer).values()
        if isinstance(each, Tensor)
    ]
    kept = sum(each.nbytes for each in tensors) / len(longest)  # bytes of a position
    # Two of them: a layer's keys and values are copied as they grow, and repeated for its heads.
    # The logits are there as the model gives them, in float32, and compared with infinity.
    logits = 12 * text_config(model).vocab_size
    row = 2 * kept * (len(longest) + max_new_tokens) + logits
    return max(least, min(_MOST_ROWS, int(free / 2 / row)))


def _free_bytes(device: torch.device) -> int | None:
    """Memory that is free on ``device``; None: this system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])
