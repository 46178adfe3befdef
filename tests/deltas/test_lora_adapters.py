"""What was trained as LoRA and merged comes back as an adapter; everything else is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from plans import batch
from tiny_models import build
from transformers import PreTrainedModel
from tuned import pair, saved

from ssah import deltas

TARGETS = {
    "llama": ["q_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gemma3": ["o_proj", "gate_proj"],
}


def merged(base: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base with a random LoRA of rank 4 merged into it."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS[base.config.model_type.removesuffix("_text")],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(copy.deepcopy(base).to(dtype), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.merge_and_unload()


@pytest.mark.parametrize("name", TARGETS)
def test_a_merged_adapter_comes_back(name: str, tmp_path: Path) -> None:
    base = build(name)
    tuned = merged(base)
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    left = deltas.to_lora(*folders, 4, out=tmp_path / "adapter")
    changed = {
        key.removesuffix(".weight")
        for key, before in base.state_dict().items()
        if not before.equal(tuned.state_dict()[key])
    }
    assert set(left) == changed
    assert max(left.values()) < 1e-4
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, tuned(**inputs).logits)
    whole = again.merge_and_unload().state_dict()
    for key, after in tuned.state_dict().items():
        torch.testing.assert_close(whole[key], after, rtol=1e-6, atol=1e-6)
    # It says what it belongs to, and tells nobody where that lies.
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert config["base_model_name_or_path"] == "base"
    assert "base_model: base\n" in card
    assert "The largest rank is 4." in card
    assert str(tmp_path) not in card
    # The same from memory.
    assert deltas.to_lora(base, tuned, 4, out=tmp_path / "other") == pytest.approx(left)


def test_what_is_left_out_is_what_numpy_leaves_out(tmp_path: Path) -> None:
    base = build("llama")
    tuned = merged(base)
    left = deltas.to_lora(base, tuned, 2, out=tmp_path / "out", tolerance=1.0)
    for name, found in left.items():
        key = f"{name}.weight"
        delta = (tuned.state_dict()[key].double() - base.state_dict()[key].double()).numpy()
        s = np.linalg.svd(delta, compute_uv=False)
        assert found == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), rel=1e-5)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    base, everything = pair("llama_tied")
    low, rounded = merged(build("llama")), build("llama", dtype=torch.bfloat16)
    cases: list[tuple[Any, Any, int, str]] = [
        (base, everything, 4, r"'model\.embed_tokens\.weight' changed, and is not the weight of a"),
        (build("llama"), low, 3, r"is not of rank 3: .* of its norm would be left out"),
        (build("llama"), low, 49, r"rank is 49; it must be at most 48, the smaller side of"),
        (rounded, merged(build("llama"), torch.bfloat16), 4, r"is not of rank 4"),
        (base, base, 4, "there is nothing to write"),
        (base, everything, 0, "rank is 0; it must be 1 or more"),
    ]
    for before, after, rank, message in cases:
        with pytest.raises(ValueError, match=message):
            deltas.to_lora(before, after, rank, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
