"""``attribute`` under every metric, beside eager hooks and the model's own forward pass.

The yardstick is the forward pass of the backbone, without the projection to the vocabulary: times
are ratios to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.attribution import METRICS, attribute
from ssah.models import move
from ssah.studies.bench.cases import sums
from ssah.studies.bench.settings import BATCH_SIZE, Settings
from ssah.units import find_modules
from ssah_kernels import timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCABULARY = 32_000


def build_model(layers: int, hidden: int) -> PreTrainedModel:
    """A Llama with random weights in bfloat16; heads of 64, two for each key/value head."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _scores_by_hooks(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Eager scoring: sums of the input of every B, by hooks on the backbone's forward."""

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        sums(args[0].flatten(0, -2))  # [rows, length, units] -> [tokens, units]

    handles = [
        module.down.register_forward_pre_hook(hook) for module in find_modules(model).values()
    ]
    model.base_model(**batch, use_cache=False)  # no vocabulary, as in attribute
    for handle in handles:
        handle.remove()


def measure_attribute(settings: Settings, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Tokens per second of ``attribute`` under every metric, beside the backbone's own forward."""
    model = move(build_model(settings.layers, settings.hidden), device)
    # Three batches in turn, so that none is in a cache since the last call.
    ids = torch.randint(0, _VOCABULARY, (3, BATCH_SIZE, settings.length), device=device)
    n_tokens = BATCH_SIZE * settings.length
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    backbone = torch.compile(model.base_model, dynamic=False) if compiled else None

    def timed(function: Callable[[dict[str, Tensor]], Any]) -> Callable[[int], None]:
        def run(i: int) -> None:
            function(batches[i % len(batches)])
            timing.wait(device)

        return run

    def scored(metric: str) -> Callable[[int], None]:
        return timed(lambda batch: attribute(model, [batch], metric=metric))

    calls = {metric: scored(metric) for metric in METRICS}
    calls["hooks"] = timed(lambda batch: _scores_by_hooks(model, batch))
    calls["eager"] = timed(lambda batch: model.base_model(**batch, use_cache=False))
    if backbone is not None:
        calls["compile"] = timed(lambda batch: backbone(**batch, use_cache=False))
    with torch.inference_mode():
        times = timing.interleave(calls, repeats=settings.scoring_rounds, warmup=1)
    seconds = {name: timing.percentiles(values) for name, values in times.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": n_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": seconds,
        "tokens_per_second": {name: n_tokens / s["p50"] for name, s in seconds.items()},
        "time_over_eager": {name: timing.ratio(times, name, "eager") for name in times},
    }
