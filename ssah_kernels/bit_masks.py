"""Masks of single elements, one bit each.

Element i of a tensor, in row-major order, is bit i % 8 of byte i // 8, the lowest bit first. Ten
elements for example, of which 0, 3 and 9 are chosen, are two bytes:

    byte 0: 0b00001001 = 9        byte 1: 0b00000010 = 2

Bits after the last element are 0, so that equal masks have equal bytes.

What is kept for the chosen elements alone, such as the state of an optimiser, lies side by side.
Where in it a block of 1,024 elements begins, its *offset*, is the number of chosen ones before it.
Of 3,000 elements of which every third is chosen, from 0 on, the offsets are 0, 342, 683 and 1,000.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from .indices import State, state_of

BLOCK = 1024  # elements for which there is an offset
_PLACES = 8  # bits in a byte
_AT_ONCE = 4096  # blocks whose bits are counted at once: 4 MiB of counts


def packed_size(numel: int) -> int:
    """Number of bytes that hold ``numel`` bits."""
    return -(-numel // _PLACES)


def n_blocks(numel: int) -> int:
    """Number of blocks of a tensor of ``numel`` elements; the last may be shorter."""
    return -(-numel // BLOCK)


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


@cache
def _counts(device: torch.device) -> Tensor:
    """How many bits of each byte are set: int64 [256]."""
    return torch.tensor([byte.bit_count() for byte in range(256)], device=device)


def count_bits(bits: Tensor) -> int:
    """How many elements are chosen, of masks ``bits``, uint8 ``[ceil(n / 8)]``; waits for a GPU."""
    return int(block_offsets(bits)[-1])


def block_offsets(bits: Tensor) -> Tensor:
    """How many elements are chosen before each block, and at all: int64 ``[blocks + 1]``.

    Args:
        bits: uint8 ``[ceil(n / 8)]``, as :func:`pack_bits` gives them; on any device.

    Raises:
        TypeError: ``bits`` is not uint8.
    """
    if bits.dtype is not torch.uint8:
        raise TypeError(f"bits is {bits.dtype}, must be torch.uint8")
    blocks = n_blocks(len(bits) * _PLACES)
    per_block = BLOCK // _PLACES  # bytes
    offsets = torch.zeros(blocks + 1, dtype=torch.int64, device=bits.device)
    for start in range(0, blocks, _AT_ONCE):
        some = bits[start * per_block : (start + _AT_ONCE) * per_block]
        counts = _counts(bits.device)[some.int()]  # [bytes]
        counts = torch.nn.functional.pad(counts, (0, -len(counts) % per_block))
        rows = counts.view(-1, per_block)  # [blocks, bytes of each]
        offsets[1 + start : 1 + start + len(rows)] = rows.sum(1)
    return offsets.cumsum_(0)


_Known: TypeAlias = tuple[weakref.ref[Tensor], weakref.ref[Tensor], State, State, int]
# (id of a mask, id of its offsets, elements) -> both, their states, how many elements train
_known: dict[tuple[int, int, int], _Known] = {}


def _checked(i: int, numel: int, bits: Tensor, offsets: Tensor) -> int:
    """How many elements the mask ``bits`` chooses, once its ``offsets`` are known to be of it."""
    key = (id(bits), id(offsets), numel)
    counted = not (bits.is_inference() or offsets.is_inference())  # those have no version
    known = _known.get(key) if counted else None
    if known is not None and known[0]() is bits and known[1]() is offsets:
        before, trained = known[2:4], known[4]
        if before == (state_of(bits), state_of(offsets)):
            return trained
    spare = -numel % _PLACES
    if spare and len(bits) and int(bits[-1]) >> (_PLACES - spare):
        raise ValueError(f"masks[{i}] has bits after the last of {numel} elements; they must be 0")
    if not torch.equal(block_offsets(bits), offsets):
        raise ValueError(
            f"offsets[{i}] does not belong to masks[{i}]; it must be what "
            "ssah_kernels.bit_masks.block_offsets gives for it"
        )
    trained = int(offsets[-1])
    if counted:
        # An id is given again once its tensor is gone: the entry must go with it.
        forget = [weakref.ref(x, lambda _: _known.pop(key, None)) for x in (bits, offsets)]
        _known[key] = (forget[0], forget[1], state_of(bits), state_of(offsets), trained)
    return trained


def check(
    params: Sequence[Tensor],
    masks: Sequence[Tensor],
    offsets: Sequence[Tensor],
    states: Sequence[Tensor],
) -> None:
    """Raise ValueError unless masks, offsets and states belong to each other.

    Their values are read once, which waits for a GPU, and again after they were changed in place.

    Args:
        params: ``[...]`` of n elements each.
        masks: uint8 ``[ceil(n / 8)]``.
        offsets: int64 ``[blocks + 1]``.
        states: ``[trained]``.
    """
    for i, (param, bits, at, state) in enumerate(zip(params, masks, offsets, states, strict=True)):
        trained = _checked(i, param.numel(), bits, at)
        if state.numel() != trained:
            raise ValueError(
                f"the states of params[{i}] have {state.numel()} elements; they must have "
                f"{trained}, as masks[{i}] has bits that are set"
            )
