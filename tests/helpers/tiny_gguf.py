"""A tiny GGUF file whose weights transformers can keep packed, and its tokenizer inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from tiny_models import VOCABULARY

HIDDEN, WIDTH, LAYERS, HEAD, HEADS, KV_HEADS = 64, 96, 2, 16, 4, 2


def write(path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0) -> None:
    """Qwen3.5 with full attention in every layer, random weights, projections of type ``kind``."""
    tokens = [*map(chr, range(33, 127)), "Ġ", "Ċ", "ab", "<|endoftext|>"]
    tokens += [f"<{i}>" for i in range(VOCABULARY - len(tokens))]
    w = GGUFWriter(path, "qwen35")
    w.add_context_length(512)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(WIDTH)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_key_length(HEAD)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(HEAD // 2)
    w.add_rope_dimension_sections([2, 1, 1, 0])
    w.add_uint32("qwen35.full_attention_interval", 1)
    w.add_ssm_conv_kernel(4)
    w.add_ssm_state_size(8)
    w.add_ssm_group_count(2)
    w.add_ssm_time_step_rank(2)
    w.add_ssm_inner_size(16)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen35")
    w.add_token_list(tokens)
    w.add_token_types([TokenType.NORMAL] * len(tokens))
    w.add_token_merges(["a b"])
    w.add_eos_token_id(tokens.index("<|endoftext|>"))
    w.add_pad_token_id(tokens.index("<|endoftext|>"))

    random = np.random.default_rng(0)

    def projection(name: str, out: int, into: int) -> None:
        values = random.normal(0, 0.15, (out, into)).astype(np.float32)
        w.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str, size: int) -> None:
        w.add_tensor(f"{name}.weight", random.normal(1, 0.1, size).astype(np.float32))

    projection("token_embd", len(tokens), HIDDEN)
    projection("output", len(tokens), HIDDEN)
    norm("output_norm", HIDDEN)
    for layer in (f"blk.{i}" for i in range(LAYERS)):
        norm(f"{layer}.attn_norm", HIDDEN)
        norm(f"{layer}.post_attention_norm", HIDDEN)
        norm(f"{layer}.attn_q_norm", HEAD)
        norm(f"{layer}.attn_k_norm", HEAD)
        projection(f"{layer}.attn_q", 2 * HEADS * HEAD, HIDDEN)  # and the gate of the output
        projection(f"{layer}.attn_k", KV_HEADS * HEAD, HIDDEN)
        projection(f"{layer}.attn_v", KV_HEADS * HEAD, HIDDEN)
        projection(f"{layer}.attn_output", HIDDEN, HEADS * HEAD)
        projection(f"{layer}.ffn_gate", WIDTH, HIDDEN)
        projection(f"{layer}.ffn_up", WIDTH, HIDDEN)
        projection(f"{layer}.ffn_down", HIDDEN, WIDTH)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
