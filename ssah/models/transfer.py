"""Tensors between the host and a GPU, with no more waiting than there must be.

A GPU works on what it was given while the host prepares the next piece. A copy from ordinary memory
ends that: the host waits until everything before it is done. A copy from pinned memory, which the
system keeps in its place, is queued like a kernel. What comes back is awaited in any case, so that
it comes in one copy: of 64 modules with 5 sums each, 320 tensors are one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Devices whose copies from pinned memory torch queues.
_QUEUES_COPIES = ("cuda", "xpu")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` [...] on ``device``; a copy from the host to a GPU is queued, not awaited."""
    if x.device.type == "cpu" and device.type in _QUEUES_COPIES:
        # torch frees pinned memory only once the copies from it are done.
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` [...] on the host, each as it is: one copy for all of a device and dtype."""
    found = list(tensors)
    kinds = {(x.device, x.dtype) for x in tensors if x.device.type != "cpu"}
    for kind in kinds:
        numbers = [i for i, x in enumerate(tensors) if (x.device, x.dtype) == kind]
        flat = torch.cat([tensors[i].reshape(-1) for i in numbers]).cpu()  # [elements of all]
        pieces = flat.split([tensors[i].numel() for i in numbers])
        for i, piece in zip(numbers, pieces, strict=True):
            # A tensor of its own: a view would keep the memory of all.
            found[i] = piece.clone().view(tensors[i].shape)
    return found
