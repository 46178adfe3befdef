"""Tokenizers of byte-level BPE with chat templates that differ in how an answer begins."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ssah.data import load_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens a block of reasoning for generation, and leaves it out of finished turns.
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
# The generation prompt ends with a space, which byte-level BPE joins to the next word.
TRAILING_SPACE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = [
    {"prompt": "What is tea?", "completion": "Tea is a drink made from leaves."},
    {"prompt": "Say hello to the whole class, please.", "completion": "Hello!"},
    {"prompt": "Count.", "completion": "One, two, three, four, five, six, seven, eight, nine."},
]


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (row["completion"] for row in load_rows("builtin:utility"))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


BPE = byte_level_bpe().to_str()


def make_tokenizer(template: str | None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(BPE)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer
