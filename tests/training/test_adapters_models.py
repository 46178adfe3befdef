"""Protected adapters of a mixture and of a model with three query heads to a key/value head.

What must stay is judged by masks that loops over the units make. What protection costs is judged
against the same adapters without it, seed by seed.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bnb_layouts
import pytest
import tiny_models
import torch
from plans import draw, masks
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
)

import ssah
from ssah.data import load_rows

peft = pytest.importorskip("peft")

SHARE = 0.03  # of the units are protected
KINDS = ("float32", "bfloat16", "4bit")


def model_of(name: str) -> PreTrainedModel:
    """Mixtral, or the shape of SmolLM2: tied, nine query heads over three key/value heads."""
    if name == "mixtral":
        return tiny_models.build(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def loaded(folder: Path, kind: str) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": "float32" if kind == "4bit" else kind}
    if kind == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def lora(model: PreTrainedModel, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    # Of a mixture "all-linear" means the experts too.
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def train(model: nn.Module, batches: list[dict[str, Tensor]], steps: int, lr: float) -> float:
    """The loss in nats over all batches after ``steps`` steps of AdamW with decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return sum(model(**each).loss.item() for each in batches) / len(batches)


def check_kept(adapted: nn.Module, mask: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Of a 4-bit base the adapter adds exactly zero where nothing may move; of another base what
    is merged has every bit there. Somewhere else something has moved."""
    inner, moved, kept = adapted.get_base_model(), 0, 0
    deltas = {
        f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}": (
            module.get_delta_weight("default").detach()
        )
        for name, module in inner.named_modules()
        if hasattr(module, "lora_A")
    }
    for name, delta in deltas.items():
        assert bool((delta[mask[name] == 0] == 0).all()), name
        moved, kept = moved + int(delta.ne(0).sum()), kept + int((mask[name] == 0).sum())
    assert moved > 0
    assert kept > 0
    if getattr(inner, "is_quantized", False):
        return  # merging rounds whole blocks anew
    for name, parameter in adapted.merge_and_unload().named_parameters():
        stays = torch.ones_like(mask[name]) if name not in deltas else mask[name] == 0
        assert torch.equal(parameter.detach()[stays.bool()], before[name][stays.bool()]), name


def compare(
    folder: Path, kind: str, batches: list[dict[str, Tensor]], *, seeds: int, steps: int, lr: float
) -> None:
    """Train adapters with and without protection, and compare units and losses over all batches."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    units = draw(plain, SHARE)
    mask = masks(plain, units, "freeze")
    # bitsandbytes' layout for AVX512-BF16 takes no module of fewer than 32 outputs.
    with bnb_layouts.processor(lays_out=False) if kind == "4bit" else nullcontext():
        base = loaded(folder, kind)
        before = {name: p.detach().clone() for name, p in base.named_parameters()}
        losses: dict[bool, list[float]] = {True: [], False: []}
        for seed in range(seeds):
            for protected, own in losses.items():
                adapted = lora(copy.deepcopy(base), seed)
                if protected:
                    ssah.protect_adapter(adapted, units)
                # Another seed is another adapter, and other rows that are seen.
                seen = batches[seed:] + batches[:seed]
                own.append(train(adapted, seen, steps, lr))
                if protected and seed == 0:
                    check_kept(adapted, mask, before)
        start = train(base, batches, 0, 0.0)
    difference = sum(a - b for a, b in zip(losses[True], losses[False], strict=True)) / seeds
    assert abs(difference) < max(losses[False]) - min(losses[False])  # the noise of the seeds
    assert abs(difference) < 0.1 * (start - max(losses[True]))  # beside what training gains


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["mixtral", pytest.param("smollm2_shape", marks=pytest.mark.exhaustive)]
)
def test_protected_entries_stay_and_the_loss_is_that_of_lora(
    name: str, kind: str, tmp_path: Path
) -> None:
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
    model_of(name).save_pretrained(tmp_path)
    batches = [tiny_models.collate(tiny_models.rows((9, 9), seed=seed)) for seed in range(4)]
    compare(tmp_path, kind, batches, seeds=4, steps=6, lr=1e-2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_protected_entries_of_smollm2(kind: str, smollm2: Path) -> None:
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = list(load_rows("builtin:utility"))[:3]
    batches = []
    for row in rows:
        ids = tokenizer(row["prompt"] + " " + row["completion"], return_tensors="pt").input_ids
        batches.append({"input_ids": ids[:, :24], "labels": ids[:, :24]})
    compare(smollm2, kind, batches, seeds=2, steps=2, lr=1e-3)
