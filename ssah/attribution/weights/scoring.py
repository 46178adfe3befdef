"""``attribute_weights``: how important every single weight is, in one pass over the data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution.result import TOKENS
from ssah.attribution.weights.example_gradients import ExampleGradients
from ssah.attribution.weights.input_norms import InputNorms
from ssah.attribution.weights.matrices import Matrix, find_matrices
from ssah.attribution.weights.passing import pass_batches
from ssah.attribution.weights.result import WEIGHT_CONTENT, WEIGHT_METRICS, WeightAttribution
from ssah.attribution.weights.sums_on_disk import zeros_on_disk
from ssah.choices import check_choice
from ssah.distributed import Ranks
from ssah.models import (
    as_it_was,
    cheap_weights_hash,
    check_backbone,
    check_whole,
    device_of,
    packed_modules,
)
from ssah.storage import check_kind, one_run
from ssah.units import model_name, units_hash

_GRADIENTS = ("snip", "fisher")


def attribute_weights(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]] | None = None,
    *,
    metric: str = "snip",
    parameters: str | Iterable[str] = "*",
    tokens: str = "auto",
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    resume_dir: str | os.PathLike[str] | None = None,
    save_every_seconds: float = 60.0,
) -> WeightAttribution:
    """Score every weight of the matrices in ``model``'s layers, all in one pass over the data.

    With a matrix W, its input x, n examples e and the next-token loss L_e of one, in nats and
    summed over the tokens that it has to predict (as of `attribute`: those with a label, or all):

    ``"snip"``: mean over examples of abs(W_ij * dL_e/dW_ij) (Lee et al. 2019, arXiv 1810.02340; by
    examples in Wei et al. 2024, arXiv 2402.05162). ``"fisher"``: mean over examples of
    (W_ij * dL_e/dW_ij)^2. ``"wanda"``: abs(W_ij) times the norm of x_j over the tokens that count
    (Sun et al. 2024, arXiv 2306.11695). ``"magnitude"``: abs(W_ij), without any data.

    An example is a row; of a row in which texts are packed, each text. So neither padding nor the
    order or the size of batches changes a score. The published code of Wei et al. divides the loss
    of an example by its number of tokens, and the paper does not.

    The scores are float32, as many as there are weights. Gradients need no other memory that grows
    with the model: one example's is made of a piece of one matrix at a time.

    Args:
        model: a transformers model of a known family; it is left as it was. Packed weights are
            unpacked one by one, and must pass gradients for those metrics.
        loader: batches, as of `attribute`; None for magnitudes.
        metric: ``"snip"``, ``"wanda"``, ``"magnitude"`` or ``"fisher"``.
        parameters: patterns of names, for instance ``"*.mlp.*"``: which of the matrices. All are
            linear projections in decoder layers, and the matrices of routed experts.
        tokens: for wanda, which positions count, as of `attribute`; else ``"auto"``.
        out: a folder for the scores, which are never in memory all at once then: sums of gradients
            are files there until the end, and each matrix is written as it is scored.
        progress: whether to show a bar with tokens per second on standard error.
        resume_dir, save_every_seconds: for wanda, as of `attribute`: a folder from which the same
            call goes on, to the same bits. Sums of gradients are too large to be written often.

    Raises:
        TypeError: ``model`` is no transformers model, or the loader yields something else.
        ValueError: an unknown option or architecture, a loader with magnitudes or none without
            them, no position that counts, nothing to predict, a model that is sharded or packed
            in a way that passes no gradient, several ranks, ``out`` with another kind of result.
        FloatingPointError: NaN or infinite activations, gradients or weights; one is named.
        RuntimeError: a matrix never ran.
    """
    whole = _checked(model, loader, metric, tokens, resume_dir, save_every_seconds)
    matrices = find_matrices(whole, parameters)
    with ExitStack() as stack:
        folder = None if out is None else Path(out)
        if folder is not None:
            check_kind(folder, WEIGHT_CONTENT)
            stack.enter_context(one_run(folder))
        stack.enter_context(as_it_was(whole))
        about: dict[str, Any] = {"tokens": None, "count": 0, "data_fingerprint": None}
        score: Callable[[str], Tensor] = lambda param: matrices[param].magnitudes()  # noqa: E731
        if loader is not None:
            watched = _watched(whole, matrices, metric, folder)
            score = watched.scores
            about = pass_batches(
                whole,
                watched,
                loader,
                metric=metric,
                tokens=tokens,
                resume_dir=resume_dir,
                save_every_seconds=save_every_seconds,
                progress=progress,
            )
        result = WeightAttribution(
            scores=_Scored(matrices, score),
            metric=metric,
            transposed=tuple(param for param, each in matrices.items() if each.transposed),
            model_name=model_name(whole),
            units_hash=units_hash(whole),
            weights_hash=cheap_weights_hash(whole),
            **about,
        )
        if folder is None:
            return replace(result, scores=dict(result.scores))
        result.save(folder)
    return WeightAttribution.load(folder)


def _checked(
    model: nn.Module,
    loader: object,
    metric: str,
    tokens: str,
    resume_dir: object,
    save_every_seconds: float,
) -> PreTrainedModel:
    """The model, once it is known that nothing that was asked is wrong."""
    check_choice("metric", metric, WEIGHT_METRICS)
    check_choice("tokens", tokens, TOKENS)
    whole = check_whole(model)
    if tokens != "auto" and metric != "wanda":
        raise ValueError(
            f"tokens is {tokens!r}; it must be 'auto' for {metric!r}: only wanda counts positions"
        )
    if resume_dir is not None and metric != "wanda":
        raise ValueError(
            f"resume_dir is {resume_dir!r}; it must be None for {metric!r}: only the sums of wanda "
            "are small enough to be kept on the way"
        )
    if not save_every_seconds >= 0:
        raise ValueError(f"save_every_seconds is {save_every_seconds}; it must be 0 or more")
    if (loader is None) != (metric == "magnitude"):
        given = "None" if loader is None else "given"
        raise ValueError(
            f"loader is {given} and metric is {metric!r}; magnitudes take no data, every other "
            "metric takes some"
        )
    if loader is not None and not isinstance(loader, Iterable):
        raise TypeError(f"loader is {type(loader).__name__}; it must yield batches")
    if metric in _GRADIENTS and whole.get_output_embeddings() is None:
        raise ValueError(
            f"metric is {metric!r}, which needs a loss, but {type(model).__name__} has no "
            "vocabulary projection; load it with AutoModelForCausalLM"
        )
    # A rank would score its own batches alone, or its own shard, and say nothing.
    if Ranks.of().size > 1 or Ranks.over(whole) is not None:
        raise ValueError(
            "attribute_weights works in one process, on a whole model; this is one of several "
            "ranks, or a shard: score in a process of its own"
        )
    check_backbone(whole)
    return whole


def _watched(
    model: PreTrainedModel, matrices: Mapping[str, Matrix], metric: str, folder: Path | None
) -> InputNorms | ExampleGradients:
    """What adds up over the batches; sums of gradients are files in ``folder`` if there is one."""
    packed = bool(packed_modules(model))
    if metric == "wanda":
        return InputNorms(model, matrices, packed=packed)
    sums = {
        param: torch.zeros(matrix.shape, dtype=torch.float32, device=device_of(matrix.owner))
        if folder is None
        else zeros_on_disk(matrix.shape, folder)
        for param, matrix in matrices.items()
    }
    return ExampleGradients(model, sums, matrices, square=metric == "fisher", packed=packed)


class _Scored(Mapping[str, Tensor]):
    """The scores of each matrix on the CPU, computed when they are asked for: once each."""

    def __init__(self, matrices: Mapping[str, Matrix], score: Callable[[str], Tensor]) -> None:
        self._matrices, self._score = matrices, score

    def __getitem__(self, param: str) -> Tensor:
        scores = self._score(param).cpu()
        if not bool(scores.max().isfinite()):  # none is below 0, and a NaN is its own maximum
            raise FloatingPointError(f"scores of {param!r} are NaN or infinite")
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)
