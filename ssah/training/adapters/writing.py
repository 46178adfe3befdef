"""A LoRA adapter as a folder in PEFT's form: tensors, ``adapter_config.json`` and a card.

PEFT adds alpha / r times B A to a weight ``[out, in]``, with B ``[out, r]`` and A ``[r, in]``. Here
alpha is the rank, so that the product is added as it is. Example: ranks 4, 4 and 2 of three
projections are ``r`` and ``lora_alpha`` 4, and ``rank_pattern`` and ``alpha_pattern`` 2 for the
third. The files are written without PEFT, which need not be installed.

Source: LoRA, Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """What is added to one projection.

    Attributes:
        b: B, ``[out, rank]``.
        a: A, ``[rank, in]``.
        bias: ``[out]``, or None. All adapters of one folder have one, or none of them.
    """

    b: Tensor
    a: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return len(self.a)


def write_adapter(
    folder: Path,
    base_model: str,
    adapters: Mapping[str, LoraFactors],
    card: str,
    *,
    fan_in_fan_out: bool,
) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained`` reads.

    Args:
        folder: where to, existing; see `ssah.storage.whole_folder`.
        base_model: what the base model is called, no path of this machine.
        adapters: name of a projection -> what is added to it.
        card: the text of ``README.md``.
        fan_in_fan_out: whether projections keep their weights as ``[in, out]``.
    """
    tensors: dict[str, Tensor] = {}
    for name, each in adapters.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = each.a.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = each.b.contiguous()
        if each.bias is not None:
            tensors[f"{prefix}.lora_B.bias"] = each.bias.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = _config(base_model, adapters) | {"fan_in_fan_out": fan_in_fan_out}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(card, "utf-8")


def _config(base_model: str, adapters: Mapping[str, LoraFactors]) -> dict[str, Any]:
    """PEFT's ``adapter_config.json``. Programs that know no ``rank_pattern`` (vLLM) take each rank
    from its tensors, and the scale from ``lora_alpha / r``: both say one."""
    rank = max(each.rank for each in adapters.values())
    others = {name: each.rank for name, each in adapters.items() if each.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(adapters),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": any(each.bias is not None for each in adapters.values()),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
