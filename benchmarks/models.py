"""The models and the batches of the benchmarks that score and train: random, of known shapes.

A layer of the smallest has 1,024 + 2,816 units and 11.8 M parameters; with 65.5 M of embeddings,
20 layers make 0.3 B. Weights are random because none of the figures depends on them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.shapes import SMALL, VOCABULARY, Shape

ROWS, LENGTH = 8, 256
Batch = dict[str, Tensor]


def build_model(dtype: str, layers: int, shape: Shape = SMALL) -> PreTrainedModel:
    """A Llama of this shape, to be evaluated, on torch's default device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def build_batches(
    n: int, ragged: bool, length: int = LENGTH, vocabulary: int = VOCABULARY
) -> list[Batch]:
    """Right-padded batches [ROWS, length]; ``ragged`` rows are 50 to 100 % of the length."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, vocabulary, (ROWS, length), generator=generator)
        lengths = torch.full((ROWS,), length)
        if ragged:
            lengths[1:] = torch.randint(length // 2, length, (ROWS - 1,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()  # [ROWS, length]
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
