"""The model ``ssah`` of lm-eval: every task of EleutherAI's harness on an ablated or updated model.

lm-eval knows the models of its own package alone. So its command is started by ours, which takes
the same arguments:

    python -m ssah.evaluation.harnesses --model ssah --tasks arc_easy
        --model_args pretrained=smollm2,groups=runs/groups,ablate=scu

In Python it is enough to import this file, or to pass the model itself:
``lm_eval.simple_evaluate(LmEvalModel("smollm2", ablate="scu", groups="runs/groups"), tasks=...)``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

if importlib.util.find_spec("lm_eval") is None:
    raise ImportError("lm-eval is not installed: pip install 'ssah[eval]'")
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ssah.evaluation.harnesses.loading import load_ablated


@register_model("ssah")
class LmEvalModel(HFLM):
    """lm-eval's model of transformers, of which units are switched off.

    Args:
        pretrained: the model, as `load_ablated` takes it.
        update, groups, ablate: as `load_ablated` takes them.
        dtype, device, trust_remote_code: as `ssah.models.load_model` takes them.
        options: of lm-eval's own model ``hf``: ``batch_size``, ``max_length``,
            ``enable_thinking`` and the like.

    Raises:
        ValueError: ``pretrained`` is missing, or as of `load_ablated`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        update: str | None = None,
        groups: str | None = None,
        ablate: str | Sequence[str] = (),
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        if pretrained is None:
            raise ValueError(
                "pretrained is missing: --model_args must have pretrained=MODEL, a folder, a .gguf "
                "or a hub id"
            )
        # The command passes cuda:0 where nobody chose, and lm-eval's own model then looks, too.
        if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
            device = "auto"
        model, tokenizer = load_ablated(
            pretrained,
            update=update,
            groups=groups,
            ablate=ablate,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
