"""The part of transformers that reads GGUF files and computes with their blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssah.compat import find

_ROOM = "transformers.integrations.gguf"
_WORKS = ">=5.17,<5.25"

_PACKED = "to keep GGUF weights packed"


def _in_gguf(place: str, purpose: str) -> Any:
    return find("transformers", f"{_ROOM}.{place}", purpose=purpose, works=_WORKS)


def config(*, packed: bool) -> Any:
    """What tells ``from_pretrained`` to keep the blocks of a GGUF file, or to unpack them."""
    made = find(
        "transformers", "transformers:GgufConfig", purpose="to load a GGUF file", works=_WORKS
    )
    return made(dequantize=not packed)


def unpacks(ggml_type: int) -> bool:
    """Whether PyTorch code of transformers unpacks this type of block."""
    return ggml_type in _in_gguf("dequant:GGML_BLOCK", "to unpack GGUF blocks")


def dequantize(weight: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    """Blocks, uint8 ``[rows, bytes]``, unpacked: ``[rows * columns]``, to be viewed."""
    unpack = _in_gguf("dequant:dequantize", "to unpack GGUF blocks")
    plain: Tensor = unpack(weight, ggml_type, dtype)
    return plain


def weight_of(module: Any) -> Tensor:
    """The weight of a ``GgufLinear`` or ``GgufEmbedding``, float32 ``[out, in]``."""
    weight = dequantize(module.weight.detach(), module.ggml_type, torch.float32)
    if not hasattr(module, "in_features"):
        return weight.view(module.num_embeddings, module.embedding_dim)
    weight = weight.view(module.out_features, module.in_features)
    if module.input_permutation is not None:
        # The module gathers its input first: column k of the blocks is channel permutation[k].
        weight = weight[:, module.input_permutation.argsort()]
    return weight


def architectures() -> list[str]:
    """The ``general.architecture`` of the files whose blocks transformers can keep."""
    return sorted(_in_gguf("gguf_conversion_mapping:GGUF_ARCHS", _PACKED))


def install_kernel(kernel: Any) -> None:
    """Let transformers multiply by blocks with ``kernel``, in this process, if it has none.

    Without one it unpacks the whole model as it loads it.
    """
    if not _in_gguf("kernels:get_gguf_kernel", _PACKED)():
        _in_gguf("kernels:_gguf_kernel", _PACKED)  # it must be there, or nothing would read it
        from transformers.integrations.gguf import kernels

        kernels._gguf_kernel = kernel
