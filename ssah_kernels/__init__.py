"""Operators that score and update the neurons of a language model (``torch.ops.ssah.*``).

Depends on torch alone: importable without a compiler, a GPU or Triton.
"""

import re
import sys

import torch

if sys.version_info < (3, 10):  # noqa: UP036 (pip asks too, but not everybody comes by pip)
    raise ImportError(f"ssah_kernels needs Python >= 3.10; this is {sys.version.split()[0]}")
if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
    raise ImportError(
        f"ssah_kernels needs torch >= 2.10; this is {torch.__version__}: pip install 'torch>=2.10'"
    )

from . import ops, registration
from .backends import available, choose, use

__all__ = ["available", "choose", "ops", "registration", "use"]
