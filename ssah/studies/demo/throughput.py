"""How fast scoring is, beside the forward pass that it rides on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ssah.attribution import attribute
from ssah.report.terminal import new_table
from ssah.studies.demo.screen import bar
from ssah_kernels import timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.data import Loader

_ROUNDS = 4
_CALLS = {
    "attribute": "ssah.attribute",
    "backbone": "forward, backbone alone",
    "model": "forward, with the vocabulary projection",
}


def throughput(console: Console, model: PreTrainedModel, loader: Loader) -> dict[str, Any]:
    """Tokens per second of ``attribute``, the backbone's forward and the whole model's.

    They are timed in turns on the same batches, so that a machine that gets slower meanwhile slows
    all three.
    """
    batches = [batch for batch, _ in zip(loader, range(_ROUNDS + 1), strict=False)]
    inputs = [
        {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        for batch in batches
    ]
    # Padding is work as well, but tokens per second are of text: [rows, tokens] -> a count a batch.
    n_tokens = [int(batch["attention_mask"].sum()) for batch in batches]

    def timed(call: Callable[[int], Any]) -> Callable[[int], None]:
        def run(i: int) -> None:
            call(i % len(batches))
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)  # a call returns before it is done
            advance(i + 1)

        return run

    calls = {
        "attribute": timed(lambda i: attribute(model, [batches[i]])),
        "backbone": timed(lambda i: model.base_model(**inputs[i], use_cache=False)),
        "model": timed(lambda i: model(**inputs[i], use_cache=False)),
    }
    with bar(console, "timing", _ROUNDS + 1) as advance, torch.inference_mode():
        times = timing.interleave(calls, repeats=_ROUNDS, warmup=1)
    # The first round warms up and is not timed.
    measured = [n_tokens[i % len(batches)] for i in range(1, _ROUNDS + 1)]
    table = new_table("Interleaved on the same batches", ("",), ("tokens/s", "time of attribute"))
    result: dict[str, Any] = {"rounds": _ROUNDS, "tokens": measured, "calls": {}}
    for name, label in _CALLS.items():
        rate = sum(measured) / sum(times[name])
        share = timing.ratio(times, "attribute", name)
        result["calls"][name] = {"tokens_per_second": rate, "attribute_time_ratio": share}
        table.add_row(label, f"{rate:,.0f}", "" if name == "attribute" else f"{share:.2f}x")
    console.print(table)
    return result
