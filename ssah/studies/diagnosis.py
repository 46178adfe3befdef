"""What alignment changed (Jain et al. 2024, arXiv 2407.10264), in four views, each with controls.

    separation    of harmful and ordinary requests at each layer, before and after alignment
    overlap       of what was changed with what each matrix puts out most (`column_overlaps`)
    gradients     how strongly the first token depends on the prompt (`input_gradient_norms`)
    alphas        W_base + alpha (W_aligned - W_base): refusal margin, and loss of ordinary answers

The controls are a random change of the same size, whose entries are those of the real one in random
places, and the ordinary requests: two halves of them for the separation, their gradients beside
those of harmful ones, and the directions that matter for them in the overlap. A model with a weight
of 1 before alignment and of 3 after it has 2 at alpha = 0.5, and 4 at 1.5.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.data import Row, make_loader
from ssah.deltas import interpolate, put_weights
from ssah.deltas.subspaces import column_overlaps, gram
from ssah.evaluation import (
    OPENING,
    bootstrap,
    fitting,
    input_gradient_norms,
    prompts,
    refusal_margins,
    utility_loss,
)
from ssah.methods import shuffled
from ssah.models import weights_hash
from ssah.report.pictures import plot_diagnosis
from ssah.representations import represent, separation
from ssah.storage import check_free
from ssah.studies.loading import Loading
from ssah.studies.run_folder import Run
from ssah.studies.sources import Sources
from ssah.studies.step_bars import Steps
from ssah.studies.unaligned import unaligned_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.data import Loader

KIND = "diagnose"


def diagnose(
    out: str | os.PathLike[str],
    aligned: Loading,
    before: str,
    *,
    safety: str = "builtin:safety",
    utility: str = "builtin:utility",
    requests: str | Sequence[str] = ("builtin:safety_eval",),
    utility_eval: str = "builtin:utility_eval",
    alphas: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    energy: float = 0.9,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int = 512,
) -> dict[str, Any]:
    """Diagnose what alignment changed; goes on where it stopped.

    Both models are in memory at once, with one more of their size, in float32 where
    ``aligned.dtype`` is ``"auto"``.

    Args:
        out: folder of the run: its record and a picture.
        aligned: the aligned model.
        before: the model before alignment, loaded in the same way.
        safety, utility: rows, as ``ssah.data.load_rows`` takes them, for the first three views.
        requests, utility_eval: harmful requests, and rows with answers, for the last one.
        alphas: how far from base to aligned; beyond 1 is further.
        energy: share of the energy in the overlap.
        seed: of the random change, and of the halves.
        batch_size: rows run at a time.
        max_length: the most tokens of a row.

    Returns:
        The record, as ``experiment.json`` has it.

    Raises:
        ValueError: the models are one, or of two architectures; an argument is out of range; the
            folder has another run, or one with other weights.
        ModelError: the models would be dealt to several devices.
    """
    check_free(out)
    aligned.check_on_one_device("a model whose weights are changed")
    _check_arguments(aligned.name, before, alphas, energy)
    sources = Sources(aligned.reading)
    harmful, ordinary = sources.rows("safety", safety), sources.rows("utility", utility)
    _check_halves(utility, len(ordinary))
    asked = sources.requests("requests", requests)
    answered = sources.rows("utility_eval", utility_eval)
    dtype = "float32" if aligned.dtype == "auto" else aligned.dtype
    model, tokenizer = aligned(dtype)
    base, _ = aligned(dtype, before)
    own = weights_hash(model)
    weights = [unaligned_hash(before, base, model, own), own]
    asked = fitting(
        asked, prompts(tokenizer, asked), max_length - OPENING, overlong=aligned.reading.overlong
    )

    def loader(own: Sequence[Row]) -> Loader:
        return make_loader(own, tokenizer, batch_size=batch_size, max_length=max_length)

    settings = {
        **aligned.settings(),
        "dtype": dtype,
        "before": before,
        "alphas": list(alphas),
        "energy": energy,
        "seed": seed,
        "max_length": max_length,
        # A folder of the same name may hold another model by now.
        "weights": weights,
    }
    changed = {"aligned": model, "random": _randomly_changed(base, model, seed)}
    sets = _Sets(loader(harmful), loader(ordinary), _halves(ordinary, seed, loader))
    measure = _Sweep(base, copy.deepcopy(base), tokenizer, asked, loader(answered), batch_size)
    with Steps(Run(out, KIND, settings, sources.record), 7 + 2 * len(alphas)) as steps:
        result: dict[str, Any] = {"separation": {}, "gradients": {}, "alphas": []}
        for name, each in {"base": base, **changed}.items():
            result["separation"][name] = steps(f"separation-{name}", partial(sets.apart, each))
            result["gradients"][name] = steps(f"gradients-{name}", partial(sets.gradients, each))
        result["overlap"] = steps("overlap", lambda: _overlaps(base, model, energy, sets.utility))
        for what, to in changed.items():
            for alpha in alphas:
                found = steps(f"alpha-{what}-{alpha:g}", partial(measure, to, alpha))
                result["alphas"].append({"change": what, "alpha": alpha, **found})
        title = f"What alignment changed: {aligned.name}"
        picture = plot_diagnosis(result, steps.run.out / "diagnosis.png", title)
    return steps.run.finish(result, [picture])


def _check_halves(source: str, rows: int) -> None:
    if rows < 2:
        raise ValueError(
            f"utility is {source!r} with {rows} row; it must have at least two, whose halves are "
            "the control"
        )


def _check_arguments(aligned: str, before: str, alphas: Sequence[float], energy: float) -> None:
    # At once, because the steps that use them come after minutes of others.
    if before == aligned:
        raise ValueError(
            f"the model before alignment (--unaligned) is {before!r}, the aligned model itself; it "
            "must be another one"
        )
    for alpha in alphas:
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; it must be a finite number")
    if not alphas or len(set(alphas)) < len(alphas):
        raise ValueError(f"alphas are {list(alphas)}; there must be some, and each once")
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; it must be greater than 0 and at most 1")


class _Sets:
    """The rows of the first three views."""

    def __init__(self, safety: Loader, utility: Loader, halves: tuple[Loader, Loader]) -> None:
        self.safety, self.utility, self.halves = safety, utility, halves

    def apart(self, model: PreTrainedModel) -> dict[str, Any]:
        """How far apart both sets are at each layer, and two halves of the ordinary one."""
        pairs = {"harmful": (self.safety, self.utility), "halves": self.halves}
        found: dict[str, Any] = {}
        for name, pair in pairs.items():
            own = separation(*(represent(model, each) for each in pair))
            found[name] = {
                "ratio": own.ratio[0].tolist(),
                "silhouette": own.silhouette[0].tolist(),
                "chance": own.chance,
            }
        return found

    def gradients(self, model: PreTrainedModel) -> dict[str, Any]:
        """Norms of the gradient of the largest logit at the embeddings, of both sets."""
        sets = {"harmful": self.safety, "ordinary": self.utility}
        return {name: _mean(input_gradient_norms(model, own)) for name, own in sets.items()}


class _Sweep:
    """A model between two others, or beyond: measured in a copy that is written over."""

    def __init__(
        self,
        base: PreTrainedModel,
        scratch: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[str],
        answered: Loader,
        batch_size: int,
    ) -> None:
        self.base, self.scratch, self.tokenizer = base, scratch, tokenizer
        self.requests, self.answered, self.batch_size = requests, answered, batch_size

    def __call__(self, to: PreTrainedModel, alpha: float) -> dict[str, Any]:
        """Margin of refusal and loss of ordinary answers, nats per token."""
        put_weights(self.scratch, interpolate(self.base, to, alpha))
        margins = refusal_margins(
            self.scratch, self.tokenizer, self.requests, batch_size=self.batch_size
        )
        return {
            "refusal_margin": _mean(margins),
            "refuses": float((margins > 0).double().mean()),
            "utility_loss": utility_loss(self.scratch, self.answered),
        }


def _overlaps(
    base: PreTrainedModel, aligned: PreTrainedModel, energy: float, utility: Loader
) -> list[dict[str, Any]]:
    """Of each matrix in the layers that was changed."""
    found = column_overlaps(base, aligned, share=energy, utility=gram(base, utility))
    return [
        {
            "matrix": name,
            "overlap": own.value,
            "random": own.random,
            "random_sd": own.random_sd,
            "utility": own.utility,
        }
        for name, own in found.items()
    ]


def _randomly_changed(
    base: PreTrainedModel, aligned: PreTrainedModel, seed: int
) -> PreTrainedModel:
    """The base with the change in random places of each tensor."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        # Parameters, and not a state dict: a tied weight is there once.
        for (name, own), to in zip(model.named_parameters(), aligned.parameters(), strict=True):
            own.add_(shuffled(to.double() - own.double(), seed, name).to(own.dtype))
    return model


def _halves(
    rows: Sequence[Row], seed: int, loader: Callable[[Sequence[Row]], Loader]
) -> tuple[Loader, Loader]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = len(rows) // 2
    first, second = ([rows[i] for i in own] for own in (order[:middle], order[middle:]))
    return loader(first), loader(second)


def _mean(values: Tensor) -> dict[str, Any]:
    """The mean over rows ``[rows]``, and its interval."""
    return {"mean": float(values.mean()), "interval": list(bootstrap(values))}
