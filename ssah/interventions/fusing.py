"""Where one operator may stand for a gated FFN's own product, act(gate) * up, with its factors.

Example: 4 rows of 64 tokens over 1,536 units are 393,216 elements, and worth it. A step of decoding
with 4 rows has 6,144 and is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssah.compat.modules import has_hooks, is_transformed
from ssah.models import runs_own_forward
from ssah_kernels import backends

# Elements of a product from which on one operator is quicker than torch's three. A call costs about
# 40 microseconds of Python, and decoding a few tokens would be 1 to 2 % slower with it.
_WORTH_FUSING = 2**17


def fuses(activation: nn.Module, gate: Tensor) -> bool:
    """Whether the operator may stand for ``activation`` in this pass over ``gate`` [..., units]."""
    # In 16 bits a model rounds three times and the operator once, which is nearer to the truth and
    # not what the model does: SmolLM2 in bfloat16 then went other ways than under `ablate`.
    if gate.element_size() < 4 or gate.numel() < _WORTH_FUSING:
        return False
    # The compiler fuses the plain product itself, and torch.func takes none written by hand.
    if torch.compiler.is_compiling() or is_transformed():
        return False
    # What was hung on the activation inside the block is to be called.
    untouched = runs_own_forward(activation) and not has_hooks(activation)
    return untouched and backends.missing(backends.choose(gate.device), gate.device) is None
