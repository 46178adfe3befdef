"""A random chat model, and margins and losses measured row by row as a whole.

The chat template begins with a system message as long as SmolLM2's own, as those of many models do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import tiny_chat

from ssah.data import Collator, make_loader
from ssah.evaluation import COMPLIANCE, REFUSAL
from ssah.evaluation.measures import opened

BATCH = 16
UTILITY = "builtin:utility_eval"
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def random_model(width: int, layers: int) -> tuple[PreTrainedModel, Any]:
    """A Llama of that shape, and the tokenizer of the tests with a system message."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=800,  # those of the tokenizer: other tokens would be no text to score
        hidden_size=width,
        intermediate_size=8 * width // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    tokenizer = tiny_chat.tokenizer()
    said = f"<|start|>system\n{_SYSTEM}<|end|>\n"
    tokenizer.chat_template = said + tokenizer.chat_template
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer


def whole_rows(model: Any, tokenizer: Any, requests: list[str]) -> list[float]:
    """Margins and the utility loss, every row run as a whole: the margins, then the loss."""
    examples = [row for text in (REFUSAL, COMPLIANCE) for row in opened(requests, text, tokenizer)]
    means = [-nats / tokens for nats, tokens in row_nats(model, tokenizer, examples)]
    refused, complied = means[: len(requests)], means[len(requests) :]
    pairs = [_nats(model, batch) for batch in make_loader(UTILITY, tokenizer, batch_size=BATCH)]
    loss = sum(sum(nats) for nats, _ in pairs) / sum(sum(tokens) for _, tokens in pairs)
    return [*(a - b for a, b in zip(refused, complied, strict=True)), loss]


def row_nats(model: Any, tokenizer: Any, examples: list[Any]) -> list[tuple[float, int]]:
    """Nats and tokens of the response of each, run as whole rows in batches of similar length."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    collator, found = Collator(tokenizer), {}
    for start in range(0, len(order), BATCH):
        own = order[start : start + BATCH]
        pairs = zip(*_nats(model, collator([examples[i] for i in own])), strict=True)
        found |= zip(own, pairs, strict=True)
    return [found[i] for i in range(len(examples))]


def _nats(model: Any, batch: Any) -> tuple[list[float], list[int]]:
    """Nats and tokens of the response of each row, with the columns that some row predicts in."""
    ids, labels = batch["input_ids"], batch["labels"]
    columns = (labels[:, 1:] != -100).any(0).nonzero()[:, 0]
    with torch.inference_mode():
        # Rows are padded on the right, so that no mask is needed.
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
        targets = labels[:, 1:][:, columns]
        nats = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
    return nats.double().sum(1).tolist(), (targets != -100).sum(1).tolist()
