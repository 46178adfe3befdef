"""Operators that score and update the neurons of a language model (``torch.ops.ssah.*``).

Depends on torch alone: importable without a compiler, a GPU or Triton.
"""

from ssah_kernels import ops, registration
from ssah_kernels.backends import available, choose, use

__all__ = ["available", "choose", "ops", "registration", "use"]
