"""The part of transformers that reads GGUF files and computes with their blocks.

A GGUF file keeps a weight as uint8 ``[rows, bytes]``: of Q8_0, for example, 32 weights are 34
bytes, a float16 scale and 32 integers. transformers multiplies by blocks with a kernel of the Hub,
and unpacks the whole model on loading where there is none: on every CPU, and without the package
``kernels``. The kernel here unpacks a single weight whenever it is used.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssah.compat import Library

_LIBRARY = Library("transformers", ">=5.17,<5.25")
_PACKED = "to keep GGUF weights packed"
_UNPACK = "to unpack GGUF blocks"
# Two threads that put a name of another library back would leave each other's there.
_READING = threading.RLock()


def _in_gguf(place: str, purpose: str) -> Any:
    return _LIBRARY.find(f"transformers.integrations.gguf.{place}", purpose)


def config(*, packed: bool) -> Any:
    """What tells ``from_pretrained`` to keep the blocks of a GGUF file, or to unpack them."""
    made = _LIBRARY.find("transformers:GgufConfig", "to load a GGUF file")
    return made(dequantize=not packed)


@contextmanager
def read_once() -> Iterator[None]:
    """Inside the block, transformers parses a GGUF file once, however often it wants to.

    For its configuration, its tokenizer and its weights it reads all strings of the vocabulary
    again, and for each module of the model it makes the table of tensor names again: of SmolLM2,
    with 49,152 tokens and 396 modules, that is more than half of the time of loading.
    """
    if importlib.util.find_spec("gguf") is None:
        yield  # what is loaded in the block says how to install it
        return
    import gguf

    with _READING:
        reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)  # type: ignore[misc, assignment]
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names  # type: ignore[misc]


def weight_of(module: Any) -> Tensor:
    """The weight of a ``GgufLinear`` or ``GgufEmbedding``, float32 ``[out, in]``."""
    weight = _dequantize(module.weight.detach(), module.ggml_type, torch.float32)
    if not hasattr(module, "in_features"):
        return weight.view(module.num_embeddings, module.embedding_dim)
    weight = weight.view(module.out_features, module.in_features)
    if module.input_permutation is not None:
        # The module gathers its input first: column k of the blocks is channel permutation[k].
        weight = weight[:, module.input_permutation.argsort()]  # [out, in]
    return weight


def keep_blocks() -> list[str]:
    """Let transformers keep GGUF weights packed from now on, in this process.

    Returns:
        the ``general.architecture`` of the files that it does so for.

    Raises:
        LibraryError: this version of transformers does not keep them packed.
    """
    architectures = sorted(_in_gguf("gguf_conversion_mapping:GGUF_ARCHS", _PACKED))
    # A kernel that is there already is a faster one than ours.
    if not _in_gguf("kernels:get_gguf_kernel", _PACKED)():
        _in_gguf("kernels:_gguf_kernel", _PACKED)  # it must be there, or nothing would read it
        from transformers.integrations.gguf import kernels

        kernels._gguf_kernel = TorchKernel()  # type: ignore[assignment]
    return architectures


class TorchKernel:
    """What transformers calls a GGUF kernel, in PyTorch; ``weight`` is uint8 ``[rows, bytes]``."""

    def supports(self, ggml_type: int) -> bool:
        """Whether PyTorch code of transformers unpacks this type of block."""
        return ggml_type in _in_gguf("dequant:GGML_BLOCK", _UNPACK)

    def dequantize(
        self, weight: Tensor, ggml_type: int, rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """``[rows, cols]``."""
        return _dequantize(weight, ggml_type, dtype).view(rows, cols)

    def get_rows(
        self, weight: Tensor, indices: Tensor, ggml_type: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """Some rows of it, ``[len(indices), cols]``."""
        return self.dequantize(weight[indices], ggml_type, len(indices), cols, dtype)

    def mul_mat_vec(self, weight: Tensor, x: Tensor, ggml_type: int, out_features: int) -> Tensor:
        """``x @ weight.T``, ``[tokens, out_features]``."""
        plain = self.dequantize(weight, ggml_type, out_features, x.shape[-1], x.dtype)
        return F.linear(x, plain)


def _dequantize(weight: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    """Blocks, uint8 ``[rows, bytes]``, unpacked: ``[rows * columns]``, to be viewed."""
    plain: Tensor = _in_gguf("dequant:dequantize", _UNPACK)(weight, ggml_type, dtype)
    return plain
