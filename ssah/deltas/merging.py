"""Go a part of the way, keep a part of what changed, or merge what several models have learnt.

    ssah.deltas.interpolate("base", "tuned", 0.5, out="half_way")
    ssah.deltas.keep("base", "tuned", 0.1, by="random", rescale=True, out="dare")
    ssah.deltas.merge("base", ["a", "b"], how="ties", share=0.2, out="both")

The formulas are in :mod:`ssah.deltas.arithmetic`, what is kept in :mod:`ssah.deltas.magnitudes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ssah.choices import Combine, Kept, KeptScope, check_choice
from ssah.deltas.arithmetic import added, chunks, combined, delta_of
from ssah.deltas.magnitudes import Draw, Largest, largest
from ssah.deltas.matching import Deltas
from ssah.deltas.results import Maker, Out, finished
from ssah.deltas.weights import WeightsOf
from ssah.settings import check_number


def interpolate(
    base: WeightsOf, tuned: WeightsOf, alpha: float, *, out: Out = None
) -> Path | dict[str, Tensor]:
    """The model that is ``alpha`` of the way from ``base`` to ``tuned``: (1 - alpha) b + alpha t.

    At 0 it is the base and at 1 the tuned model, bit for bit; above 1 and below 0 it extrapolates.
    A weight that training did not change stays bit for bit at every ``alpha``. Computed in float64
    and rounded once to the dtype of ``tuned``.

    Args:
        base, tuned: folders of safetensors or hub ids, which are read tensor by tensor; or models
            or state dicts in memory, which are not changed.
        alpha: how far; no unit.
        out: for folders, where the result goes: new or empty. It has the files of ``tuned``, its
            dtypes, configuration and tokenizer, and ``delta.json``, which says what was done.

    Returns:
        ``out``; or for models in memory a state dict on the CPU, name -> ``[...]``.

    Raises:
        ValueError: ``alpha`` is not finite; the models differ in names or shapes; ``out`` is
            missing, or given for models in memory.
        FileExistsError: ``out`` has something in it.
        FloatingPointError: a weight is NaN or infinite.
        ModelError: a model cannot be found or read, or is quantised.

    Source: Wortsman et al. 2021, arXiv 2109.01903 (WiSE-FT).
    """
    check_number("alpha", alpha)
    return _merged({"edit": "interpolate", "alpha": alpha}, base, [tuned], out, scales=[alpha])


def keep(
    base: WeightsOf,
    tuned: WeightsOf,
    share: float,
    *,
    by: Kept = "magnitude",
    rescale: bool = False,
    scope: KeptScope = "model",
    seed: int = 0,
    out: Out = None,
) -> Path | dict[str, Tensor]:
    """The base with a share of what training changed: the rest has the bits of the base.

    DARE with a drop rate of 0.9 is ``keep(base, tuned, 0.1, by="random", rescale=True)``.

    Args:
        base, tuned, out: as of `interpolate`.
        share: of the elements, above 0 and at most 1.
        by: ``"magnitude"``: those that changed most, floor(share * n + 0.5) of n, ties to the lower
            index; ``"random"``: each with probability ``share``.
        rescale: divide what is kept by ``share``.
        scope: what magnitudes are compared over: the whole ``"model"``, or each ``"tensor"``.
        seed: of what is drawn. The same seed keeps the same elements however files are cut.

    Returns:
        ``out``; or for models in memory a state dict on the CPU, name -> ``[...]``.

    Raises:
        ValueError: a share, ``by`` or ``scope`` that is none; other errors as of `interpolate`.

    Source: Yu et al. 2023, arXiv 2311.03099 (DARE).
    """
    keeping = _Keeping(share, by, rescale, scope, seed)
    return _merged({"edit": "keep", **keeping.describe()}, base, [tuned], out, keeping=keeping)


def merge(
    base: WeightsOf,
    tuned: Sequence[WeightsOf],
    *,
    how: Combine = "mean",
    scale: float | Sequence[float] = 1.0,
    share: float = 1.0,
    by: Kept = "magnitude",
    rescale: bool = False,
    scope: KeptScope = "model",
    seed: int = 0,
    out: Out = None,
) -> Path | dict[str, Tensor]:
    """Add to the base what several models have learnt from it.

    Args:
        base: the model that all were tuned from, as of `interpolate`.
        tuned: one model or more; the result has the files and dtypes of the first.
        how: ``"sum"``: task arithmetic; ``"mean"``; ``"ties"``: elements that disagree with the
            sign of the sum are left out, and the others averaged.
        scale: of every delta, or one number for each; no unit. The papers: 0.3 to 0.4 for a sum,
            about 1 for TIES. ``merge(base, [tuned, aligned], how="sum", scale=[1, 0.5])`` adds half
            of what alignment changed to another model that was tuned from the same base.
        share, by, rescale, scope, seed: what is kept of each delta before, as of `keep`. TIES keeps
            0.2 by magnitude, a merge with DARE 0.1 at random, rescaled. Each model has its own
            draw and its own ranking.
        out: as of `interpolate`.

    Returns:
        ``out``; or for models in memory a state dict on the CPU, name -> ``[...]``.

    Raises:
        ValueError: ``how`` is none of these, or there are more or fewer scales than models; other
            errors as of `keep`.

    Source: Ilharco et al. 2022, arXiv 2212.04089 (task arithmetic); Yadav et al. 2023, arXiv
    2306.01708 (TIES). TIES here leaves out an element whose sum is exactly 0, where the published
    code gives it the sign that most of the model has.
    """
    check_choice("how", how, get_args(Combine))
    # One for each model, whatever was given: the record shows what was done.
    scales = [scale] * len(tuned) if isinstance(scale, int | float) else list(scale)
    if len(scales) != len(tuned):
        raise ValueError(
            f"scale has {len(scales)} numbers; it must have one, or one for each of the "
            f"{len(tuned)} tuned models"
        )
    for each in scales:
        check_number("scale", each)
    keeping = _Keeping(share, by, rescale, scope, seed)
    record = {"edit": "merge", "how": how, "scale": scales, **keeping.describe()}
    return _merged(record, base, tuned, out, how=how, scales=scales, keeping=keeping)


class _Keeping:
    """What is kept of each delta: the arguments of `keep`, checked."""

    def __init__(self, share: float, by: Kept, rescale: bool, scope: KeptScope, seed: int) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share!r}; it must be greater than 0 and at most 1")
        check_choice("by", by, get_args(Kept))
        check_choice("scope", scope, get_args(KeptScope))
        self.share, self.by, self.scope, self.seed = share, by, scope, seed
        self.factor = 1 / share if rescale else 1.0
        self._ranked: list[dict[str, Largest]] = []

    def rank(self, deltas: Deltas) -> None:
        """Look through all tensors for the largest elements, where these are kept."""
        # A draw does not depend on the weights: they are spared two passes.
        if self.by == "random" or self.share == 1:
            return
        names = [name for name in deltas.names if deltas.in_float(name)]
        # What is ranked together has one threshold.
        together = [names] if self.scope == "model" else [[name] for name in names]
        for place in range(len(deltas.tuned)):
            pieces = partial(_pieces, deltas, place)
            ranked: dict[str, Largest] = {}
            for each in together:
                ranked |= largest(each, pieces, self.share)
            self._ranked.append(ranked)

    def of(self, name: str, place: int, scale: float) -> Callable[[Tensor], Tensor]:
        """Gives what is kept of the next piece ``[n]`` of a tensor's delta to one model, scaled."""
        if self.share == 1:
            return lambda delta: delta * scale
        # Made anew for each tensor: a generator and a count of ties serve one pass, front to back.
        chosen: Draw | Largest = (
            Draw(self.share, self.seed, name, place)
            if self.by == "random"
            else self._ranked[place][name]
        )
        factor = scale * self.factor
        return lambda delta: torch.where(chosen.mask(delta), delta * factor, 0.0)

    def describe(self) -> dict[str, object]:
        """The arguments, for a record."""
        given = {"share": self.share, "by": self.by, "rescale": self.factor != 1}
        return given | ({"scope": self.scope} if self.by == "magnitude" else {"seed": self.seed})


def _merged(
    record: Mapping[str, object],
    base: WeightsOf,
    tuned: Sequence[WeightsOf],
    out: Out,
    *,
    scales: Sequence[float] = (1.0,),
    how: Combine = "sum",
    keeping: _Keeping | None = None,
) -> Path | dict[str, Tensor]:
    deltas = Deltas(base, tuned)
    kept = keeping or _Keeping(1.0, "magnitude", False, "model", 0)  # all of it

    def plan() -> Maker:
        # Only now: what is wrong with the models or the folder has been refused, which is quick.
        kept.rank(deltas)
        return partial(_make, deltas, how, scales, kept)

    return finished(deltas, out, record, plan)


def _make(
    deltas: Deltas, how: Combine, scales: Sequence[float], keeping: _Keeping, name: str
) -> Tensor:
    """The tensor ``name`` of the result, ``[...]``."""
    base, tuned = deltas.read(name)
    if not deltas.in_float(name):
        return tuned[0]  # counters and the like, which nothing has trained
    if not any(scales):
        return base.to(tuned[0].dtype)  # the bits of its zeros too, of which there are two
    kept = [keeping.of(name, place, scale) for place, scale in enumerate(scales)]

    def change(own: list[Tensor]) -> Tensor:
        return combined([of(delta) for of, delta in zip(kept, own, strict=True)], how)

    return added(base, tuned, change, name)


def _pieces(deltas: Deltas, place: int, name: str) -> Iterator[Tensor]:
    """The delta of one tensor to one tuned model, in pieces ``[n]``."""
    base, tuned = deltas.read(name)
    for b, t in chunks(base, tuned[place]):
        yield delta_of(name, b, t)
