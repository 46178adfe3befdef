"""Operators of the hub's kernel beside PyTorch's, as `kernels benchmark FOLDER` runs them.

FOLDER is what `python runs/hub.py FOLDER` makes. On a CPU the kernel has its float64 reference
alone, so the times say something on a GPU only.
"""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark
from torch import Tensor
from torch.nn.functional import silu

TOKENS, CHANNELS = 2048, 4096


class Operators(Benchmark):
    """Activations are [TOKENS, CHANNELS] in bfloat16; the weight is [CHANNELS, CHANNELS]."""

    seed = 0

    def setup(self) -> None:
        where = {"device": self.device, "dtype": torch.bfloat16}
        self.gate, self.up = (torch.randn(TOKENS, CHANNELS, **where) for _ in range(2))
        self.weight = torch.randn(CHANNELS, CHANNELS, **where)
        self.state = self.kernel.ops.new_moments(self.gate)
        self.backend = "reference" if self.device == "cpu" else "triton"

    def benchmark_gated_moments(self) -> None:
        with self.kernel.use(self.backend):
            self.out = self.kernel.ops.gated_moments(self.gate, self.up, *self.state)

    def verify_gated_moments(self) -> Tensor:
        h = silu(self.gate.float()) * self.up.float()
        torch.var_mean(h, 0)  # timed beside the operator, which makes both
        return h.bfloat16()

    def benchmark_column_sq_norms(self) -> None:
        with self.kernel.use(self.backend):
            self.out = self.kernel.ops.column_sq_norms(self.weight)

    def verify_column_sq_norms(self) -> Tensor:
        return self.weight.double().square().sum(0)
