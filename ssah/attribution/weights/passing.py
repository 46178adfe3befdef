"""All batches of a loader through a model whose matrices are watched, and what they were."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ssah.attribution.batches import BatchReader, counted_tokens
from ssah.attribution.resuming import BatchState, run_identity
from ssah.attribution.tally import Tally
from ssah.attribution.weights.example_gradients import ExampleGradients
from ssah.attribution.weights.input_norms import InputNorms
from ssah.distributed import Ranks
from ssah.models import cheap_weights_hash, packed_modules
from ssah.progress import token_bar


def pass_batches(
    model: PreTrainedModel,
    watched: InputNorms | ExampleGradients,
    loader: Iterable[Mapping[str, Any]],
    *,
    metric: str,
    tokens: str,
    resume_dir: str | os.PathLike[str] | None,
    save_every_seconds: float,
    progress: bool,
) -> dict[str, Any]:
    """Pass all batches through the model: once, or those that an interrupted run has not done.

    Args:
        model: the model.
        watched: what adds up over the batches.
        loader, metric, tokens, resume_dir, save_every_seconds, progress: of `attribute_weights`.

    Returns:
        What the result tells of the data: tokens, count and fingerprint.

    Raises:
        ValueError, TypeError, FloatingPointError, RuntimeError: as of `attribute_weights`.
    """
    n_expected = operator.length_hint(loader, 0) or None
    batches = iter(loader)
    begun = list(islice(batches, 1))  # the first batch says what "auto" means
    if tokens == "auto" and begun:
        tokens = counted_tokens(begun[0])
    reader = BatchReader(model, tokens=tokens, keep_mask=bool(packed_modules(model)))
    tally = Tally(getattr(loader, "fingerprint", None))
    with ExitStack() as stack:
        state = None
        if resume_dir is not None:
            assert isinstance(watched, InputNorms)
            asked = {"metric": metric, "tokens": tokens, "parameters": list(watched.matrices)}
            weights = cheap_weights_hash(model)
            identity = run_identity(model, reader.device, weights, **asked, data=tally.fingerprint)
            state = BatchState(
                Path(resume_dir),
                identity,
                watched.sums,
                ranks=Ranks(),
                gradient=False,
                every=save_every_seconds,
            )
            stack.callback(state.close)
        done = 0 if state is None else state.done
        advance = stack.enter_context(token_bar(n_expected, done)) if progress else None
        stack.enter_context(watched.watching())
        for number, raw in enumerate(chain(begun, batches)):
            batch = reader.read(raw, number)
            tally.add(batch)  # also of those that an earlier run has done
            if state is not None and state.has(raw):
                continue
            watched.run(batch)
            if state is not None:
                state.add()
            if advance is not None:
                advance(int(batch.attended.sum()))
        if state is not None:
            state.end()
    tally.join(Ranks())
    tally.check(metric=metric, tokens=tokens)
    if isinstance(watched, ExampleGradients) and tally.n_targets == 0:
        raise ValueError("loader has no token to predict: the loss is empty")
    for param in watched.silent():
        raise RuntimeError(
            f"the matrix {param!r} never ran, so that its weights have no score: leave it out with "
            "parameters=[...]"
        )
    count = watched.count if isinstance(watched, ExampleGradients) else tally.counted
    return {"tokens": tokens, "count": count, "data_fingerprint": tally.fingerprint}
