"""Sums that need not fit in memory: tensors whose memory is a file.

The system reads what is used, and writes back what was changed where memory is short. The file has
no name any more once it is mapped: it is gone with the tensor, whatever ends the process.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from ssah.storage import naming


def zeros_on_disk(shape: tuple[int, ...], folder: Path) -> Tensor:
    """Zeros, float32 ``[*shape]``, in a file that lies in ``folder``.

    Raises:
        OSError: there is no room for it.
    """
    with naming(folder), NamedTemporaryFile(dir=folder, prefix=".sums-") as file:
        # All of it now: a disk that is full later on would end the process, without an error.
        os.posix_fallocate(file.fileno(), 0, 4 * prod(shape))
        flat = torch.from_file(file.name, shared=True, size=prod(shape), dtype=torch.float32)
    return flat.view(shape)
