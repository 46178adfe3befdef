"""SNIP and Fisher: the gradient of every matrix, example by example, in one backward pass.

An example is a document: a row of a batch, or one of several texts packed in a row. With L_e the
next-token loss of example e in nats, summed over the tokens that it has to predict, and n examples,

    snip      1/n sum_e |W * dL_e/dW|       Wei et al. 2024, arXiv 2402.05162, section 3
    fisher    1/n sum_e (W * dL_e/dW)^2     the diagonal of the empirical Fisher matrix, times W^2

The absolute value and the square are of each example, so that a gradient that is added up over a
batch will not do. A matrix gets the gradient of one example from the tokens of that example alone:
with its inputs X_e ``[tokens, in]`` and the gradient D_e ``[tokens, out]`` at its outputs,

    dL_e/dW = D_e' X_e        one product an example, as long as its tokens

which costs what the gradient of the whole batch costs, and no pass of its own for any layer. W is
the same for all examples: it is multiplied in once, at the end.

Example: a weight of 2 has the gradients 3 and -1 in two examples. Its snip is 2 * (3 + 1) / 2 = 4
and its fisher 4 * (9 + 1) / 2 = 20; of the gradient added up, 2, nothing of that could be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution.batches import IGNORED, Batch
from ssah.attribution.forward_backward import run_batch
from ssah.attribution.watch import Watch, check_recorded
from ssah.attribution.weights.matrices import Matrix
from ssah.models import passing_gradients, replaced_forward
from ssah.units import DOWN, RoutedExperts, Routing

_AT_ONCE = 1 << 20  # elements of a gradient that are made at a time on a CPU, to stay in its cache

Span = tuple[int, int]


class ExampleGradients:
    """Sums over examples of |dL_e/dW| or of its square, as batches pass through the model.

    Attributes:
        sums: name of a parameter -> float32 of its shape.
        count: examples so far that have a token to predict.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sums: dict[str, Tensor],
        matrices: Mapping[str, Matrix],
        *,
        square: bool,
        packed: bool,
    ) -> None:
        """Nothing has been seen yet.

        Args:
            model: the model.
            sums: name of a parameter -> zeros, float32 ``[out, in]``, or as the parameter has it.
            matrices: name of a parameter -> what is scored.
            square: whether squares are summed, for fisher.
            packed: whether there are packed weights.
        """
        self._model, self._matrices, self._packed = model, matrices, packed
        self.sums, self.square, self.count = sums, square, 0
        self._watch = Watch(gradient=True)
        self._documents: Tensor  # int64 [rows * length], the number of its document; -1: padding
        self._spans: list[Span]  # the same, as first and last position + 1 of each document
        self._ran: set[str] = set()  # by any batch so far
        self._now: set[tuple[str, int | None]] = set()  # by the batch that runs

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block, what flows back through the model is added to the sums."""
        with ExitStack() as stack:
            experts: dict[nn.Module, dict[str, Matrix]] = {}
            for param, matrix in self._matrices.items():
                if matrix.routed is not None:
                    leaf = param.rpartition(".")[2]
                    experts.setdefault(matrix.owner, {})[leaf] = matrix
                    continue
                # Before the hooks of others: it is the matrix's own output that is meant.
                hook = matrix.owner.register_forward_hook(self._hook(param), prepend=True)
                stack.callback(hook.remove)
            for module, own in experts.items():
                routed = next(iter(own.values())).routed
                assert routed is not None
                stack.enter_context(replaced_forward(module, self._experts(routed, own)))
            stack.enter_context(passing_gradients(self._model))
            yield

    def run(self, batch: Batch) -> None:
        """Pass one batch through the model and back, inside of `watching`."""
        attended, starts = batch.attended.flatten(), batch.starts.flatten()  # [rows * length]
        self._documents = (starts.cumsum(0) - 1).masked_fill_(~attended, -1)
        self._spans = _spans(self._documents)
        self._now.clear()
        run_batch(self._model, batch, self._watch, sharded=False, packed=self._packed)
        predicting = self._documents[(batch.targets != IGNORED).flatten().to(attended.device)]
        self.count += len(predicting.unique())

    def _hook(self, param: str) -> Any:
        def tap(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            x: Tensor = args[0]  # [..., in]
            if x.shape[:-1].numel() != len(self._documents):
                raise ValueError(
                    f"what enters {param!r} has shape {list(x.shape)}; it must have one row for "
                    f"each of the {len(self._documents)} positions of the batch, so that it is "
                    "known which example it is of: leave it out with parameters=[...]"
                )
            return self._tap(param, None, x, out, self._spans)

        return tap

    def _experts(self, routed: RoutedExperts, own: Mapping[str, Matrix]) -> Any:
        def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            # x: [..., hidden]; chosen, weights: [..., top_k], the experts of each token.
            leading = x.shape[:-1]
            x, chosen, weights = (each.flatten(0, -2) for each in (x, chosen, weights))
            routing = Routing.of(chosen, routed.n_experts)
            documents = self._documents.to(x.device)[routing.token]  # [pairs]

            def tap(leaf: str, rows: Tensor, out: Tensor) -> Tensor:
                # What enters one of the two matrices, and what it puts out: [pairs, ...] each.
                if (matrix := own.get(leaf)) is None:
                    return out
                pieces = [
                    self._tap(matrix.param, e, rows[a:b], out[a:b], _spans(documents[a:b]))
                    for e, (a, b) in enumerate(routing.spans)
                    if b > a
                ]
                return torch.cat(pieces) if pieces else out

            rows = x[routing.token]  # [pairs, hidden]
            a = routed.gate(tap(routed.up, rows, routed.project(rows, routing)))
            out = routing.weighed(tap(DOWN, a, routed.put_out(a, routing)), weights).to(x.dtype)
            return out.view(*leading, -1)

        return forward

    def _tap(
        self, param: str, expert: int | None, x: Tensor, out: Tensor, spans: list[Span]
    ) -> Tensor:
        """``out``, such that its gradient is taken when it arrives. Both are ``[..., channels]``.

        ``expert``: whose matrix it is; ``spans``: where each example has its tokens.
        """
        check_recorded()
        if not self._watch.again:  # else it is computed anew, and what arrives is of the first time
            if (param, expert) in self._now:
                raise ValueError(
                    f"the matrix {param!r} runs twice for one batch, so that its gradient arrives "
                    "in two parts: choose others with parameters=[...]"
                )
            self._now.add((param, expert))
            self._ran.add(param)
        if not out.requires_grad:  # the first matrices: nothing before them needs a gradient
            # Not a leaf, which the model could not change in place, as OLMo's clipping does.
            out = out + out.new_zeros((), requires_grad=True)
        x, version = x.detach(), x._version

        def take(grad: Tensor) -> None:
            if x._version != version:
                raise RuntimeError(
                    f"what enters {param!r} was changed in place after it was read, so that its "
                    "gradient cannot be told; leave it out with parameters=[...]"
                )
            total = self.sums[param] if expert is None else self.sums[param][expert]
            # [tokens, out] and [tokens, in]; the other way around for a transposed matrix.
            left, right = grad.flatten(0, -2), x.flatten(0, -2)
            if self._matrices[param].transposed:
                left, right = right, left
            add_products_(total, left, right, spans, square=self.square)

        out.register_hook(take)
        return out

    def silent(self) -> Iterator[str]:
        """Matrices that never ran."""
        return (param for param in self._matrices if param not in self._ran)

    def scores(self, param: str) -> Tensor:
        """Of the weights of a parameter, float32 ``[out, in]``, or as the parameter has it.

        Once: its sum becomes the scores.
        """
        total, matrix = self.sums.pop(param), self._matrices[param]
        factor = matrix.magnitudes().to(total.device)
        if self.square:
            factor.square_()
        return total.div_(self.count).mul_(factor)


def _spans(documents: Tensor) -> list[Span]:
    """First position and last position + 1 of each document that numbers ``[tokens]`` tell."""
    numbers, counts = torch.unique_consecutive(documents, return_counts=True)
    ends = counts.cumsum(0)
    bounds = zip((ends - counts).tolist(), ends.tolist(), numbers.tolist(), strict=True)
    return [(start, end) for start, end, number in bounds if number >= 0]


def add_products_(
    total: Tensor, left: Tensor, right: Tensor, spans: list[Span], *, square: bool
) -> None:
    """Add |left' right| of every span, element by element, or its square, to ``total``.

    Args:
        total: float32 ``[m, n]``.
        left, right: ``[tokens, m]`` and ``[tokens, n]`` of one dtype.
        spans: which tokens each product is over.
        square: whether squares are added.

    A block of rows of ``total`` is finished before the next one is begun: it is read and written
    once for all spans.
    """
    if left.dtype == torch.float16:  # whose range the gradients of one example may leave
        left, right = left.float(), right.float()
    step = len(total) if left.is_cuda else max(1, _AT_ONCE // total.shape[1])
    # Made once: to get memory for every product takes longer than to fill it.
    made = left.new_empty(min(step, len(total)), total.shape[1])
    for start in range(0, len(total), step):
        block = total[start : start + step]  # [at once, n]
        columns = left[:, start : start + step].T  # [at once, tokens]
        for first, end in spans:
            gradient = torch.mm(columns[:, first:end], right[first:end], out=made[: len(block)])
            gradient = (gradient.square_() if square else gradient.abs_()).to(total.device)
            block += gradient
