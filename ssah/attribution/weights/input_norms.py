"""Wanda: how large what enters every matrix is, in one forward pass.

With x_j(t) the input j of a matrix W at token t, over all tokens that count,

    score of W_ij = |W_ij| * sqrt(sum_t x_j(t)^2)        Sun et al. 2024, arXiv 2306.11695

Example: the inputs (1, 0) and (1, 2) have the norms sqrt 2 and 2, so that the weights (3, -1) of
one output have the scores 3 sqrt 2 = 4.24 and 2: the larger one counts more.

Of an expert the tokens are those that are routed to it. The sum of squares is M2 + n mean^2, of the
moments that scores of units are made of (``ssah.attribution.sums``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution.batches import Batch
from ssah.attribution.expert_sums import add_moments_
from ssah.attribution.forward_backward import run_batch
from ssah.attribution.sums import ExpertSums, Sums, check_finite, new_sums
from ssah.attribution.watch import Watch, watching
from ssah.attribution.weights.matrices import Matrix
from ssah.models import device_of
from ssah.units import DepthTwoModule, Routing, find_modules
from ssah_kernels import ops
from ssah_kernels.reference.channel_moments import merge_moments_


class InputNorms:
    """The moments of what enters each matrix, as batches pass through the model.

    Attributes:
        sums: name of what is read -> its moments. What is read is the input of a B, by the name of
            the depth-2 module, or of another matrix, by the parameter, with the expert's number.
        matrices: name of a parameter -> what is scored.
    """

    def __init__(
        self, model: PreTrainedModel, matrices: Mapping[str, Matrix], *, packed: bool
    ) -> None:
        self._model, self.matrices, self._packed = model, matrices, packed
        found = find_modules(model).items()
        # What enters B is watched where scores of units watch it: that pass is the fastest one.
        self._watched = {name: m for name, m in found if m.output.param in matrices}
        self.sums = new_sums(self._watched)
        # Matrix -> the sums of its input, one an expert.
        self._read = {param: self._sums_of(matrix) for param, matrix in matrices.items()}
        self._watch: Watch
        # The last tensor that was read, and its moments: Q, K and V get one tensor.
        self._last: tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]] | None = None

    def _sums_of(self, matrix: Matrix) -> list[str]:
        own = [name for name, m in self._watched.items() if m.output.param == matrix.param]
        if own:
            return own
        experts = matrix.shape[0] if matrix.routed else 1
        names = [f"{matrix.param}[{expert}]" for expert in range(experts)]
        layer = Sums.zeros((experts, matrix.n_inputs), device_of(matrix.owner))
        self.sums |= {name: layer.of_expert(expert) for expert, name in enumerate(names)}
        return names

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block, whatever runs through the model is added to the sums."""
        with ExitStack() as stack:
            # First: a gated FFN with a hook inside would not run its fused forward.
            places = _places(self._watched)
            self._watch = stack.enter_context(watching(self._watched, self.sums, gradient=False))
            watched = {module.output.param for module in self._watched.values()}
            for param, matrix in self.matrices.items():
                if param in watched:
                    continue
                place = places.get(param, matrix.owner)
                hook = self._experts_hook(matrix) if matrix.routed else self._hook(param)
                stack.callback(place.register_forward_pre_hook(hook).remove)
            yield

    def run(self, batch: Batch) -> None:
        """Pass one batch through the model, inside of `watching`."""
        self._last = None
        run_batch(self._model, batch, self._watch, sharded=False, packed=self._packed)
        self._last = None

    def _hook(self, param: str) -> Any:
        own = self.sums[f"{param}[0]"]

        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0].detach()  # [..., in]
            if self._last is None or self._last[0] is not args[0]:
                fresh = ops.new_moments(x)
                ops.channel_moments_(x, *fresh, self._watch.mask(x))
                self._last = (args[0], fresh)
            merge_moments_(own.count, own.mean, own.m2, *self._last[1])

        return read

    def _experts_hook(self, matrix: Matrix) -> Any:
        first = self.sums[self._read[matrix.param][0]]
        assert isinstance(first, ExpertSums)
        layer = first.layer

        def read(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden, chosen = args[0].detach(), args[1]  # [..., hidden], [..., top_k]
            mask = self._watch.mask(hidden)
            routing = Routing.of(chosen.flatten(0, -2), len(layer.count))
            x = hidden.flatten(0, -2)[routing.token]  # [pairs, hidden]
            counted = None if mask is None else mask.flatten()[routing.token]  # [pairs]
            add_moments_(layer, x, routing, counted)

        return read

    def silent(self) -> Iterator[str]:
        """Matrices that nothing has entered."""
        for param, names in self._read.items():
            if not any(bool(self.sums[name].count) for name in names):
                yield param

    def scores(self, param: str) -> Tensor:
        """Of the weights of a parameter, float32 ``[out, in]``, or as the parameter has it."""
        matrix, names = self.matrices[param], self._read[param]
        check_finite({name: self.sums[name] for name in names}, gradient=False)
        norms = torch.stack([_norms(self.sums[name]) for name in names])  # [experts, in]
        # [experts, 1, in], or [experts, in, 1] where the matrix is transposed.
        norms = norms[:, :, None] if matrix.transposed else norms[:, None, :]
        return matrix.magnitudes().mul_((norms if matrix.routed else norms[0]).float())


def _norms(sums: Sums) -> Tensor:
    """The norm of each channel over the tokens, float64 ``[in]``."""
    return (sums.m2 + sums.count * sums.mean.square()).sqrt()


def _places(modules: Mapping[str, DepthTwoModule]) -> dict[str, nn.Module]:
    """A's weights of gated FFNs -> the FFN, which gets what they get."""
    gated = {m.gated.module: m for m in modules.values() if m.gated and m.gated.is_plain}
    return {
        owned.param: place
        for place, module in gated.items()
        for owned in module.inputs
        if owned.param.endswith(".weight")
    }
