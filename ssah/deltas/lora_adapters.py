"""A delta of low rank as a LoRA adapter: the base with the adapter is the tuned model.

LoRA adds B A to a weight ``[out, in]``, with B ``[out, r]`` and A ``[r, in]``. A delta D of rank r
is D V V^T with its leading right singular vectors V ``[in, r]`` (:mod:`ssah.deltas.low_ranks`), so
that B = D V and A = V^T. Where ``out`` is the smaller side, V are the left ones: B = V, A = V^T D.
Example: D = [[2, 4], [1, 2]] has rank 1 and V = (1, 2) / sqrt 5. B is (10, 5) / sqrt 5, and B A is
D.

What was trained as LoRA and merged is of low rank up to the rounding of the merge: some 1e-5 of the
delta in float32, and often a third of it in bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssah.deltas.arithmetic import blocks, delta_of
from ssah.deltas.low_ranks import BLOCK, leading_vectors
from ssah.deltas.matching import Deltas
from ssah.deltas.weights import WeightsOf
from ssah.storage import public_name, whole_folder
from ssah.training import LoraFactors, adapter_card, write_adapter
from ssah.units import model_name


def to_lora(
    base: WeightsOf, tuned: WeightsOf, rank: int, *, out: str | Path, tolerance: float = 1e-3
) -> dict[str, float]:
    """Write what training changed as a LoRA adapter, where all of it is of low rank.

    Args:
        base, tuned: as of `ssah.deltas.interpolate`; not state dicts.
        rank: of the adapter; at most the smaller side of each projection that changed.
        out: a folder, new or empty, for ``peft.PeftModel.from_pretrained``. Its tensors are
            float32.
        tolerance: how much of the change of a projection may be left out, as a fraction of its
            norm.

    Returns:
        Name of each projection that changed -> what is left out of its change: a fraction of its
        norm, measured on the factors as they are written.

    Raises:
        ValueError: a change is not of this rank; something else than the weight of a projection
            changed; nothing did; or as of `ssah.deltas.interpolate`. All are named.
        FileExistsError, FloatingPointError, ModelError: as of `ssah.deltas.interpolate`.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be 1 or more")
    deltas = Deltas(base, [tuned])
    # All is computed inside, so that a refusal leaves no folder.
    with whole_folder(out) as folder:
        adapters: dict[str, LoraFactors] = {}
        left: dict[str, float] = {}
        dtype = ""
        for name in deltas.names:
            before, (after,) = deltas.read(name)
            if bool((before == after).all()):  # compared in the wider dtype, where they differ
                continue
            module, transposed = _projection(deltas, name, rank)
            dtype = str(before.dtype).removeprefix("torch.")
            if transposed:  # a Conv1D keeps [in, out]
                before, after = before.T, after.T
            adapters[module], left[module] = _factors(name, before, after, rank)
            if left[module] > tolerance:
                raise ValueError(
                    f"the change of {name!r} is not of rank {rank}: {left[module]:.2%} of its norm "
                    f"would be left out, must be at most {tolerance:.2%} (tolerance). Take a "
                    "higher rank; where a 16-bit merge has rounded the change, no rank is enough"
                )
        if not adapters:
            raise ValueError("tuned has the weights of base: there is nothing to write")
        conv = isinstance(deltas.base.model.get_submodule(next(iter(adapters))), Conv1D)
        base_model = public_name(model_name(deltas.base.model))
        card = _card(base_model, rank, left, dtype)
        write_adapter(folder, base_model, adapters, card, fan_in_fan_out=conv)
    return left


def _card(base_model: str, rank: int, left: dict[str, float], dtype: str) -> str:
    what = (
        f"Each of {len(left)} projections is changed by the matrix of rank {rank} that is nearest "
        "to what training changed."
    )
    exact = f"At most {max(left.values()):.1e} of the norm of such a change is left out."
    return adapter_card(base_model, dtype, dict.fromkeys(left, rank), what, exact)


def _projection(deltas: Deltas, name: str, rank: int) -> tuple[str, bool]:
    """The module whose weight ``name`` is, and whether it keeps that as ``[in, out]``."""
    weights = deltas.tuned[0]
    owner, _, leaf = weights.param(name).rpartition(".")
    module = weights.model.get_submodule(owner)
    if leaf != "weight" or not isinstance(module, nn.Linear | Conv1D):
        raise ValueError(
            f"{name!r} changed, and is not the weight of a projection, which is all that LoRA "
            f"changes: put it back first (ssah.deltas.rewind(base, tuned, {name!r}))"
        )
    if rank > min(weights.shapes[name]):
        raise ValueError(
            f"rank is {rank}; it must be at most {min(weights.shapes[name])}, the smaller side of "
            f"{name!r}"
        )
    return owner, isinstance(module, Conv1D)


def _factors(name: str, base: Tensor, tuned: Tensor, rank: int) -> tuple[LoraFactors, float]:
    """B ``[out, rank]`` and A ``[rank, in]``, float32, and what they lack as `to_lora` says it.

    ``base`` and ``tuned`` are ``[out, in]``.
    """
    tall = base.shape[0] >= base.shape[1]
    b, t = (base, tuned) if tall else (base.T, tuned.T)  # [long side, short side]
    leading = leading_vectors(name, b, t, rank)  # [short side, rank]
    short = leading.float()
    long = torch.cat(
        [(delta_of(name, b[rows], t[rows]) @ leading).float() for rows in blocks(b, BLOCK)]
    )
    # Against the factors as they are written: their rounding counts too.
    missing = whole = 0.0
    for rows in blocks(b, BLOCK):
        delta = delta_of(name, b[rows], t[rows])
        missing += float((delta - long[rows].double() @ short.T.double()).square().sum())
        whole += float(delta.square().sum())
    pair = LoraFactors(long, short.T) if tall else LoraFactors(short, long.T)
    return pair, (missing / whole) ** 0.5
