"""The model and the batches of the benchmarks that score and train: random, of one shape.

A layer has 1,024 + 2,816 units and 11.8 M parameters; with 65.5 M of embeddings, 20 layers make
0.3 B. Weights are random because none of the figures depends on them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

ROWS, LENGTH, VOCABULARY = 8, 256, 32_000
Batch = dict[str, Tensor]


def build_model(dtype: str, layers: int) -> PreTrainedModel:
    """A Llama with 16 heads of 64 and 8 key/value heads, to be evaluated."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def build_batches(n: int, ragged: bool) -> list[Batch]:
    """Right-padded batches [ROWS, LENGTH]; ``ragged`` rows are 50 to 100 % of the length."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        lengths = torch.full((ROWS,), LENGTH)
        if ragged:
            lengths[1:] = torch.randint(LENGTH // 2, LENGTH, (ROWS - 1,), generator=generator)
        mask = (torch.arange(LENGTH) < lengths[:, None]).long()  # [ROWS, LENGTH]
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
