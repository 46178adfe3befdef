"""Masks of single elements, one bit each.

Element i of a tensor, in row-major order, is bit i % 8 of byte i // 8, the lowest bit first. Ten
elements for example, of which 0, 3 and 9 are chosen, are two bytes:

    byte 0: 0b00001001 = 9        byte 1: 0b00000010 = 2

Bits after the last element are 0, so that equal masks have equal bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLACES = 8  # bits in a byte


def packed_size(numel: int) -> int:
    """Number of bytes that hold ``numel`` bits."""
    return -(-numel // _PLACES)


def pack_bits(mask: Tensor) -> Tensor:
    """The bits of a mask: bool ``[...]`` of n elements -> uint8 ``[ceil(n / 8)]``, on its device.

    Raises:
        TypeError: ``mask`` is not bool.
    """
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask is {mask.dtype}, must be torch.bool")
    padded = mask.new_zeros(packed_size(mask.numel()) * _PLACES)
    padded[: mask.numel()] = mask.reshape(-1)
    places = torch.arange(_PLACES, dtype=torch.uint8, device=mask.device)
    # [bytes, 8] -> [bytes]: no two bits of a byte meet, so that the sum is their union.
    return (padded.view(-1, _PLACES).to(torch.uint8) << places).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The mask that the bits are of: uint8 ``[ceil(n / 8)]`` -> bool ``shape``, of n elements.

    Raises:
        TypeError: ``bits`` is not uint8.
        ValueError: ``bits`` has another number of bytes than ``shape`` needs.
    """
    numel = torch.Size(shape).numel()
    if bits.dtype is not torch.uint8:
        raise TypeError(f"bits is {bits.dtype}, must be torch.uint8")
    if tuple(bits.shape) != (packed_size(numel),):
        raise ValueError(
            f"bits has shape {list(bits.shape)}, must have [{packed_size(numel)}] for a tensor of "
            f"shape {list(shape)}"
        )
    places = torch.arange(_PLACES, dtype=torch.uint8, device=bits.device)
    mask = (bits[:, None] >> places) & 1  # [bytes, 8]
    return mask.view(-1)[:numel].view(torch.bool).reshape(shape)
