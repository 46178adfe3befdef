"""What ``masked_adamw_`` and ``masked_sgd_`` share: trained elements, gradients, rounding, units.

**Trained elements.** ``indices[i]`` (int64, strictly increasing, or None for all) selects entries
along ``dims[i]`` of ``params[i]``. Everything else in the call (gradient, optimiser state,
compensation) is compact: it has the parameter's shape with ``len(indices[i])`` in place of the size
of that dimension. Nothing but the selected elements of a parameter is written. With a parameter
[4, 3], index [1, 3] and dimension 0, the state is [2, 3] and rows 0 and 2 stay what they are. The
gradient is [2, 3] too, or [4, 3] and read at the index.

**Gradient.** g = grad / grad_scale * clip_coef, negated under ``maximize``. grad_scale is what the
loss was multiplied by, clip_coef the factor of clipping; a missing one is 1. Where ``found_inf`` is
not 0 nothing is written at all.

**Rounding.** The new value of every tensor is computed in full (float32 arithmetic in the backends)
and rounded once to the tensor's dtype: to nearest even, with two exceptions.

* ``compensations[i]`` holds what a parameter of 16 bits could not. Of a bfloat16 parameter it is
  int16, and the two are a float32 weight w: its bits are those of p, times 2^16, plus c. The update
  is that of float32, and nothing of w is lost. p is w to nearest, a tie away from zero, since c
  goes from -2^15 to 2^15 - 1. Of a float16 parameter c is float16: the update reads w = p + c, and
  writes p = round(w), c = round(w - p).
* With ``seed``, a bfloat16 tensor (a parameter without compensation, or state) is rounded
  stochastically: of the float32 result's 32 bits, b, the upper half of b + r is kept, where r is
  uniform in [0, 2^16). Infinite and NaN values take no noise. The expectation is exact.

Take 1.001, between the neighbours 1 and 1.0078 of bfloat16. To nearest it is always 1, so that a
weight of 1 which grows by 0.001 a step never moves. Stochastically it is 1.0078 once in 7.8 steps.
With a compensation w is 1.001, 1.002, 1.003, and in the fourth step 1.004. The bits of 1.004 are
0x3f808312: p is 1.0078 (0x3f81) then, and c is 0x8312 - 0x10000 = -31982.

**Noise.** r depends on the seed, the step, the tensor's position in the list and the element's
position e in the compact tensor (row-major), and on nothing else. In arithmetic modulo 2^32:

    mix(x):  x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15;  x *= 0xd35a2d97;  x ^= x >> 15
    key(k):  k = mix(k ^ word)  for word in (seed low, seed high, step low, tensor's position)
    k0 = key(0x243f6a88)        k1 = key(0x85a308d3) + (e >> 32)
    x = k0 + e;  x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15 ^ k1;  x *= 0xd35a2d97;  x ^= x >> 15
    r of the parameter     = x & 0xffff
    r of the first state   = x >> 16
    r of the second state  = (x * 0x9e3779b1) >> 16

(A keyed permutation of e by the multiply-xorshift rounds of Wellons' "hash prospector", under 1 %
of the cost of the update; any two of an element's three numbers are independent.)

**Importance.** ``signed[i]`` and ``squared[i]``, float64 of the compact size along ``dims[i]``, get
each unit's sum of p * grad / grad_scale and of its square, with p as it was before the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks.matrices import as_matrix
from ..dynamic_map import dequantize, n_blocks, quantize

WORD = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
KEYS = (0x243F6A88, 0x85A308D3)
GOLDEN = 0x9E3779B1


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * MULTIPLIERS[0] & WORD  # Python's integers have no end: keep 32 bits
    x ^= x >> 15
    x = x * MULTIPLIERS[1] & WORD
    return x ^ x >> 15


def noise_keys(seed: int, step: int, number: int) -> tuple[int, int]:
    """(k0, k1) of the tensor at position ``number``."""
    keys = []
    for key in KEYS:
        for word in (seed & WORD, seed >> 32 & WORD, step & WORD, number):
            key = _mix(key ^ word)
        keys.append(key)
    return keys[0], keys[1]


def noise(keys: tuple[int, int], element: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """16 random bits for parameter, first and second state of every ``element``: [...] each."""
    x = (element + keys[0]) & WORD  # int64, whose lower half holds the word
    x = ((x ^ x >> 16) * MULTIPLIERS[0]) & WORD
    x = ((x ^ x >> 15 ^ ((element >> 32) + keys[1] & WORD)) * MULTIPLIERS[1]) & WORD
    x = x ^ x >> 15
    return x & 0xFFFF, x >> 16, (x * GOLDEN & WORD) >> 16


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """``x`` [...] in bfloat16, up with the probability that makes the expectation exact."""
    word = x.float().view(torch.int32).long() & WORD
    # Noise would turn an infinite value into NaN, and could turn a NaN into a number.
    word = torch.where(x.float().isfinite(), word + bits, word)
    upper = word >> 16
    # int16 has a sign: its upper half of patterns is negative.
    result = torch.where(upper >= 1 << 15, upper - (1 << 16), upper).to(torch.int16)
    return torch.where(x.isnan(), x.to(torch.bfloat16), result.view(torch.bfloat16))


def selected(param: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """The trained elements of ``param`` [units, other], in float64: [trained, other]."""
    return (param if index is None else param.index_select(dim, index)).double()  # compact


def write_(param: Tensor, index: Tensor | None, dim: int, value: Tensor) -> None:
    """Store ``value`` [trained, other] in the trained elements of ``param`` [units, other]."""
    if index is None:
        param.copy_(value)
    else:
        param.index_copy_(dim, index, value)


def entry(tensors: Sequence[Tensor] | None, i: int) -> Tensor | None:
    """The ``i``-th of a list that may be missing."""
    return None if tensors is None else tensors[i]


def split_float32(w: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16, int16) whose bits together are those of float32 ``w`` [...]."""
    word = w.view(torch.int32).long()
    # Arithmetic leaves NaNs of several patterns, of which some would round to -0.
    word = torch.where(w.isnan(), 0x7FC00000, word) + 0x8000
    return (word >> 16).to(torch.int16).view(torch.bfloat16), ((word & 0xFFFF) - 0x8000).short()


def join_float32(p: Tensor, rest: Tensor) -> Tensor:
    """What :func:`split_float32` split: float32 [...]."""
    return ((p.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def trained_weight(
    param: Tensor, index: Tensor | None, dim: int, compensation: Tensor | None
) -> Tensor:
    """The trained elements of ``param`` with what compensates them, in float64: compact."""
    if compensation is None:
        return selected(param, index, dim)
    if compensation.dtype != torch.int16:
        return selected(param, index, dim) + compensation.double()
    p = param if index is None else param.index_select(dim, index)
    return join_float32(p.contiguous(), compensation.view(p.shape)).double()


def trained_gradient(grad: Tensor, param: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """``grad`` [trained, other], or what ``index`` selects of one of the shape of ``param``."""
    if index is None or grad.shape != param.shape:
        return grad
    return grad.index_select(dim, index)  # an index of everything changes nothing


def skips(found_inf: Tensor | None) -> bool:
    """Whether the update writes nothing."""
    return found_inf is not None and float(found_inf) != 0


def gradient(
    grad: Tensor, grad_scale: Tensor | None, clip_coef: Tensor | None, maximize: bool
) -> Tensor:
    """The gradient that the update uses, in float64: [trained, other], of ``grad`` alike."""
    g = grad.double()
    if grad_scale is not None:
        g = g / grad_scale.double()
    if clip_coef is not None:
        g = g * clip_coef.double()
    return -g if maximize else g


def add_importance_(
    param: Tensor,
    grad: Tensor,
    grad_scale: Tensor | None,
    dim: int,
    signed: Tensor,
    squared: Tensor,
) -> None:
    """Add each unit's sums of p * g and (p * g)^2 to ``signed`` and ``squared`` [trained].

    ``param`` holds the trained elements alone, [trained, other] as ``grad``.
    """
    # Neither clipping nor the direction of the step changes what a unit is worth.
    product = param * gradient(grad, grad_scale, None, False)  # compact
    other = [d for d in range(param.dim()) if d != dim % param.dim()] if param.dim() else []
    per_unit = product.sum(other) if other else product  # [units]
    signed += per_unit.reshape(signed.shape)  # of a parameter without dimensions [] -> [1]
    per_unit = product.square().sum(other) if other else product.square()
    squared += per_unit.reshape(squared.shape)


class Rounder:
    """Rounds the new values [trained, other] of one tensor's update, and writes them."""

    def __init__(self, grad: Tensor, step: Tensor, seed: Tensor | None, number: int) -> None:
        self.bits: tuple[Tensor, Tensor, Tensor] | None = None
        if seed is not None:
            keys = noise_keys(int(seed), int(step), number)
            element = torch.arange(grad.numel(), device=grad.device).view(grad.shape)  # compact
            self.bits = noise(keys, element)

    def __call__(self, x: Tensor, dtype: torch.dtype, which: int) -> Tensor:
        """``x`` [trained, other] in ``dtype``; ``which``: 0 for the parameter, then the states."""
        if self.bits is None or dtype != torch.bfloat16:
            return x.to(dtype)
        return round_stochastically(x, self.bits[which])

    def write_param_(
        self,
        param: Tensor,
        index: Tensor | None,
        dim: int,
        w: Tensor,
        compensation: Tensor | None,
    ) -> None:
        """Store the new value ``w`` [trained, other], and the rest of it in ``compensation``."""
        if compensation is None:
            write_(param, index, dim, self(w, param.dtype, 0))
            return
        # To nearest: what rounding leaves is not lost, so that no noise has to make up for it.
        if compensation.dtype == torch.int16:
            p, rest = split_float32(w.float())
            compensation.copy_(rest)
            write_(param, index, dim, p)
            return
        p = w.to(param.dtype)
        compensation.copy_(w - p.double())
        write_(param, index, dim, p)


@dataclass
class State:
    """Compact state of one tensor, in a floating-point dtype or, with scales, in 8 bits.

    Attributes:
        values: the state, or its codes.
        scales: float32, of the codes as a matrix: [rows, blocks] of [rows, columns].
        which: 1 or 2, the first or the second state: it decides the noise and the map.
        dim: that the units run along.
    """

    values: Tensor
    scales: Tensor | None
    which: int
    dim: int

    def read(self) -> Tensor:
        """The state in float64."""
        if self.scales is None:
            return self.values.double()
        codes = as_matrix(self.values, self.dim)  # [rows, columns]
        scales = self.scales.view(len(codes), n_blocks(codes.shape[1]))
        read = dequantize(codes, scales, signed=self.which == 1).double()
        return read.view(self.values.shape)

    def write_(self, value: Tensor, rounded: Rounder) -> None:
        """Store ``value``, of the shape of the state, rounded once."""
        if self.scales is None:
            self.values.copy_(rounded(value, self.values.dtype, self.which))
            return
        codes, scales = quantize(as_matrix(value.float(), self.dim), signed=self.which == 1)
        self.values.copy_(codes.view(value.shape))
        self.scales.view(scales.shape).copy_(scales)
