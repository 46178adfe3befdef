"""Hashes of what a plan keeps frozen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_BYTES_AT_ONCE = 1 << 26


def digest(pieces: Iterable[Tensor]) -> str:
    """SHA-256 (hex) of the dtype and the bytes of tensors in turn, each in its logical order.

    How one tensor is cut into pieces makes no difference.
    """
    state = hashlib.sha256()
    dtype = None
    for piece in pieces:
        if dtype is None:
            dtype = piece.dtype
            state.update(str(dtype).encode())
        flat = piece.detach().contiguous().reshape(-1)
        for chunk in flat.split(max(1, _BYTES_AT_ONCE // flat.element_size())):
            state.update(chunk.cpu().view(torch.uint8).numpy())
    return state.hexdigest()


def digests(
    pieces: Mapping[str, Callable[[], Iterable[Tensor]]], at_once: int = 8
) -> dict[str, str]:
    """:func:`digest` of every weight by name; several at a time, since hashing holds no lock."""
    workers = min(at_once, os.cpu_count() or 1)
    # In a forked process torch makes its pool of threads anew when it first needs it, which two
    # threads must not do at once: this one does it now.
    torch.set_num_threads(torch.get_num_threads())
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(pieces, pool.map(lambda name: digest(pieces[name]()), pieces), strict=True))
