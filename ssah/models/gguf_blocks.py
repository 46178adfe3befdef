"""GGUF weights that stay in their blocks on devices that transformers has no kernel for.

transformers multiplies by packed blocks with a kernel from the Hub, and unpacks the whole model on
loading where there is none: on every CPU, and without the package ``kernels``. The one here unpacks
a single weight whenever it is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssah.compat import gguf


class TorchKernel:
    """What transformers calls a GGUF kernel, in PyTorch; ``weight`` is uint8 ``[rows, bytes]``."""

    def supports(self, ggml_type: int) -> bool:
        """Whether PyTorch code of transformers unpacks this type."""
        return gguf.unpacks(ggml_type)

    def dequantize(
        self, weight: Tensor, ggml_type: int, rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """``[rows, cols]``."""
        return gguf.dequantize(weight, ggml_type, dtype).view(rows, cols)

    def get_rows(
        self, weight: Tensor, indices: Tensor, ggml_type: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """Some rows of it, ``[len(indices), cols]``."""
        return self.dequantize(weight[indices], ggml_type, len(indices), cols, dtype)

    def mul_mat_vec(self, weight: Tensor, x: Tensor, ggml_type: int, out_features: int) -> Tensor:
        """``x @ weight.T``, ``[tokens, out_features]``."""
        plain = self.dequantize(weight, ggml_type, out_features, x.shape[-1], x.dtype)
        return F.linear(x, plain)


def keep_blocks() -> list[str]:
    """Let transformers keep GGUF weights packed from now on, in this process.

    Returns:
        the ``general.architecture`` of the files that it does so for.

    Raises:
        ImportError: this version of transformers does not keep them packed.
    """
    architectures = gguf.architectures()
    gguf.install_kernel(TorchKernel())
    return architectures
