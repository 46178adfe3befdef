"""A batch of ``attribute`` waits for no GPU, and what it summed is brought back in a few copies.

The GPU is pretended (tests/helpers/pretend_gpu.py): it counts, and computes what the CPU does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from threading import Thread
from unittest import mock

import pytest
import torch
from pretend_gpu import PretendGPU
from scores import ragged
from tiny_models import build
from transformers.masking_utils import create_causal_mask

import ssah
from ssah.attribution import BatchReader
from ssah.compat.transformers import unpacked_rows
from ssah.models import to_host
from ssah.models.transfer import _QUEUES_COPIES

# Where a torch without a GPU can go backward. It has no autocast, and no copies that are queued.
WITH_BACKWARD = "lazy"


@pytest.mark.parametrize(
    ("metric", "side"),
    [
        ("variance", "right"),
        ("taylor", "left"),
        pytest.param("norm", "left", marks=pytest.mark.exhaustive),
        pytest.param("variance", "left", marks=pytest.mark.exhaustive),
        pytest.param("fisher", "right", marks=pytest.mark.exhaustive),
    ],
)
def test_no_batch_waits_for_a_gpu(metric: str, side: str) -> None:
    """And the scores are, bit for bit, those of the CPU."""
    model, batches = build("llama"), [*ragged(side), *ragged(side)]
    model.set_attn_implementation("eager")
    expected = ssah.attribute(model, batches, metric=metric)
    kind = WITH_BACKWARD if metric in ("taylor", "fisher") else "cuda"
    counts: list[int] = []
    with ExitStack() as stack:
        # A weight that is no plain tensor is refused, and a pretended one is none.
        stack.enter_context(mock.patch("ssah.units.projections.check_weight"))
        queues = (*_QUEUES_COPIES, WITH_BACKWARD)
        stack.enter_context(mock.patch("ssah.models.transfer._QUEUES_COPIES", queues))
        if kind == WITH_BACKWARD:
            stack.enter_context(mock.patch("torch.autocast", return_value=nullcontext()))
        gpu = stack.enter_context(PretendGPU(kind))
        gpu.take(model)

        def loader() -> Iterator[dict[str, torch.Tensor]]:
            for batch in batches:
                counts.append(len(gpu.waits))
                yield batch
            counts.append(len(gpu.waits))

        found = ssah.attribute(model, loader(), metric=metric)
    # The first is taken before the weights are hashed, which reads them.
    assert counts[1:] == [counts[1]] * 4, gpu.said()
    assert not any("batches.py" in w.where or "watch.py" in w.where for w in gpu.waits), gpu.said()
    # The sums of all modules, and the norms of the columns of B.
    assert len(gpu.waits) - counts[-1] <= 2, gpu.said()
    for name, scores in expected.scores.items():
        assert torch.equal(found.scores[name], scores), name
        assert torch.equal(found.variance[name], expected.variance[name]), name
    assert found.count == expected.count


def test_a_batch_that_a_loader_put_on_the_gpu_is_brought_back_once() -> None:
    model = build("llama")
    expected = BatchReader(model, tokens="labels").read(ragged("left")[0], 0)
    with PretendGPU() as gpu:
        gpu.take(model)
        there = {key: value.to("cuda:0") for key, value in ragged("left")[0].items()}
        reader = BatchReader(model, tokens="labels")
        gpu.waits.clear()
        batch = reader.read(there, 0)
        assert len(gpu.waits) == 1, gpu.said()
        assert {x.device.type for x in batch.inputs.values()} == {"cuda"}
        for key, value in expected.inputs.items():
            assert torch.equal(batch.inputs[key].cpu(), value), key
    assert torch.equal(batch.targets, expected.targets)
    assert torch.equal(batch.token_mask, expected.token_mask)


def test_what_is_brought_back_together_is_what_each_was() -> None:
    values = [torch.arange(3.0), torch.ones(2, 2).double(), torch.zeros(()), torch.empty(0, 3)]
    with PretendGPU() as gpu:
        there = [x.to("cuda:0") for x in values]
        gpu.waits.clear()
        back = to_host([*there, values[0]])
        assert len(gpu.waits) == 2, "one of each dtype"
    for own, must in zip(back, [*values, values[0]], strict=True):
        assert (own.device.type, own.dtype) == ("cpu", must.dtype)
        assert torch.equal(own, must)
        assert own.untyped_storage().nbytes() == own.nbytes, "its memory is its own"


def test_packed_rows_are_looked_for_outside_of_the_block_and_in_other_threads() -> None:
    """Two documents of two tokens: without a look, the second attends to the first."""
    config = build("llama").config
    config._attn_implementation = "eager"
    positions = torch.tensor([[0, 1, 0, 1]])

    def attends() -> list[bool]:
        embeds = torch.zeros(1, 4, 8)
        mask = create_causal_mask(config, embeds, None, None, positions)
        return [bool(each == 0) for each in mask[0, 0, 2]]

    apart, together = [False, False, True, False], [True, True, True, False]
    seen: list[list[bool]] = []
    assert attends() == apart
    with unpacked_rows():
        assert attends() == together
        thread = Thread(target=lambda: seen.append(attends()))
        thread.start()
        thread.join()
    assert seen == [apart]
    assert attends() == apart


def test_models_compile_whole_after_they_were_scored() -> None:
    """A compiler cannot read what ``unpacked_rows`` sets, and every model looks for packed rows."""
    model, ids = build("llama"), torch.tensor([[3, 4, 5, 6]])
    ssah.attribute(model, [{"input_ids": ids}], tokens="all")
    torch.compiler.reset()
    with torch.no_grad():
        must = model(input_ids=ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, must)
