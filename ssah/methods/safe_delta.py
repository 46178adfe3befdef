"""Safe Delta: of what fine-tuning changed, the part is kept that costs refusals least.

Lu et al., ICML 2025, arXiv 2505.12038. With a the aligned and t the tuned weight ``[out, in]`` of a
projection, d = t - a, and H = sum x x^T of its inputs x on refusals, as of Optimal Brain Surgeon:

    cost of d_ij      d_ij^2 / [H^-1]_jj        what it changes of H's form, the rest compensating
    its utility       d_ij^2                    so that the cost per utility is c_j = 1 / [H^-1]_jj
    kept              whole columns j with the lowest c_j, while the sum of their costs is at most
                      s mean(c) out in / 4096^2, or a share of what all of d costs
    compensation      the change of the other columns that makes  e H e^T  least for each row e of
                      the whole change: with K the kept ones, e = d_K ([H^-1]_KK)^-1 [H^-1]_K

Example: H = [[2, 1], [1, 1]] has H^-1 = [[1, -1], [-1, 2]], and so c = (1, 1/2). Column 1 is kept
first. With d_1 = 2 the change is 2 / 2 (-1, 2) = (-1, 2): column 0 gives way by -1, and e H e^T is
2, where (0, 2) alone has 4. A factor of H cancels everywhere: the paper's 2 / n is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssah.deltas import Deltas, Maker, delta_of
from ssah.deltas.subspaces import Gram, GramPasses
from ssah.methods.drawing import shuffled
from ssah.methods.editing import edited, in_layers, is_turned
from ssah.methods.frame import Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Edited
from ssah.settings import setting
from ssah.units import share_count

_SIDE = 4096  # of the matrix that the budget is meant for


@dataclass(frozen=True)
class SafeDelta(Method):
    """Keep changes that cost safety least."""

    name: ClassVar[str] = "safe-delta"
    paper: ClassVar[str] = "Lu et al., Safe Delta, ICML 2025, arXiv 2505.12038"
    equation: ClassVar[str] = (
        "keep d_j of the lowest 1 / [H^-1]_jj in a budget s; compensate by OBS"
    )
    stage: ClassVar[Stage] = "after"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "tuned", "safety")
    departures: ClassVar[tuple[str, ...]] = (
        "All entries of a column have one cost per utility, and are kept or not together.",
        "The rest is compensated at once, in float64; the published code goes from left to right, "
        "and lets only later columns give way.",
        "A budget is for the whole matrix and in proportion to its size; the published code has "
        "blocks of 2048 columns with s / 2 each, and counts rows by 4096.",
        "A budget may be a share of what the whole change costs too: s fits changes of one size.",
        "The share of columns that is never kept is a setting; the published code has it as a "
        "constant, which the paper does not mention.",
        "Whatever is no matrix of a layer is that of the aligned model, as in the published code; "
        "so are experts that a model keeps in one tensor.",
    )
    against: ClassVar[str] = "As many random columns of each matrix are kept, and none compensates."
    published: ClassVar[str] = "Refusals stay as before, whatever the data, at no loss of the task."
    # A change ten times as large costs a hundred times as much, and s would keep nothing of it.
    strength: ClassVar[str | None] = "share"
    # Inputs differ in size by orders of magnitude, so that a little of the cost buys many columns.
    strengths: ClassVar[tuple[float, ...]] = (0.01, 0.1, 0.5)
    instead: ClassVar[tuple[str, ...]] = ("budget",)

    budget: float = setting(0.1, "s: what the kept changes may cost, see the paper.", min=0)
    share: float | None = setting(
        None, "In its place: a share of what the whole change of a matrix costs.", min=0, max=1
    )
    never: float = setting(0.15, "Share of the columns, the costliest, never kept.", min=0, max=1)
    damping: float = setting(0.01, "Of the mean of H's diagonal, added to it.", above=0)

    def _find(self, inputs: Inputs) -> Edited:
        model, safety = inputs.model, inputs.safety
        assert safety is not None
        passes: list[GramPasses] = []

        def plan(deltas: Deltas, seed: int | None) -> Maker:
            names = [name for name in deltas.names if in_layers(deltas, name)]
            owners = {name: deltas.tuned[0].param(name).removesuffix(".weight") for name in names}
            own = {
                name: owner
                for name, owner in owners.items()
                if isinstance(model.get_submodule(owner), nn.Linear | Conv1D)
            }
            # Shared by the method and its controls: where one pass is enough, it is made once.
            if not passes:
                passes.append(GramPasses(model, safety, own.values(), tokens="all"))
            return lambda name: self._make(deltas, name, own.get(name), passes[0], seed)

        return edited(self, inputs.aligned, [inputs.tuned], plan)

    def _make(
        self, deltas: Deltas, name: str, owner: str | None, grams: GramPasses, seed: int | None
    ) -> Tensor:
        a, (t,) = deltas.read(name)
        if owner is None:
            return a.to(t.dtype)
        turned = is_turned(deltas, name)
        d = delta_of(name, a, t)
        d = d.T if turned else d  # [out, in]
        inverse = self._inverse(grams[owner])
        kept = self.kept(d, inverse)
        if seed is None:
            change = compensated(d, inverse, kept)
        else:
            drawn = shuffled(torch.arange(d.shape[1]), seed, name)[: len(kept)]
            change = torch.zeros_like(d).index_copy_(1, drawn, d[:, drawn])
        return (a.double() + (change.T if turned else change)).to(t.dtype)

    def _inverse(self, of: Gram) -> Tensor:
        """H^-1, float64 ``[in, in]``."""
        h = of.matrix.clone()
        # Inputs that are never there, or always the same, would leave H without an inverse.
        h.diagonal().add_(self.damping * h.diagonal().mean())
        return torch.cholesky_inverse(torch.linalg.cholesky(h))

    def kept(self, d: Tensor, inverse: Tensor) -> Tensor:
        """The columns of ``d`` ``[out, in]`` that are kept: int64 ``[n]``, the cheapest first."""
        per_utility = 1 / inverse.diagonal()  # [in]
        n = d.shape[1] - share_count(self.never, d.shape[1])
        order = per_utility.argsort(stable=True)[:n]
        costs = d.square().sum(0) * per_utility  # [in]
        if self.share is None:
            most = self.budget * float(per_utility.mean()) * d.numel() / _SIDE**2
        else:
            most = self.share * float(costs.sum())
        return order[costs[order].cumsum(0) <= most]


def compensated(d: Tensor, inverse: Tensor, kept: Tensor) -> Tensor:
    """The change ``[out, in]`` that has ``d`` in the columns ``kept`` and costs least otherwise."""
    own = inverse[kept]  # [kept, in]
    change = torch.linalg.solve(own[:, kept], d[:, kept].T).T @ own
    change[:, kept] = d[:, kept]  # which the product gives but for rounding
    return change
