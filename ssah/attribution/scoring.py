"""``attribute``: how important every unit is on a data set, in one pass over it.

A call has three stages. What is asked is checked on this rank and compared with the other ranks.
Then every batch passes through the model, whose modules add to their sums meanwhile. In the end the
sums of all ranks are joined, and scores are made of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from ssah.attribution.result import Attribution
from ssah.attribution.run import Run
from ssah.attribution.scores import score_all
from ssah.distributed import Group, Ranks
from ssah.moved import renamed
from ssah.units import KINDS


@renamed(group="process_group", state="resume_dir", save_every="save_every_seconds")
def attribute(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    metric: str = "variance",
    modules: Iterable[str] = KINDS,
    tokens: str = "auto",
    all_experts: bool = False,
    progress: bool = False,
    process_group: Group = "auto",
    resume_dir: str | os.PathLike[str] | None = None,
    save_every_seconds: float = 60.0,
) -> Attribution:
    """Score every unit of ``model`` on the data of ``loader``, in one pass over it.

    The activation entering B is a, of unit j at token t. ``"variance"``: unbiased variance of a_j
    over tokens times the squared norm of column j of B (SSAH, arXiv 2410.10862, eq. 1).
    ``"norm"``: the same with the mean of a_j^2 (Wanda, arXiv 2306.11695, structured). ``"taylor"``:
    absolute value of the sum over tokens of a_j * dL/da_j (arXiv 1906.10771). ``"fisher"``: sum
    over tokens of (a_j * dL/da_j)^2. L is the next-token loss in nats, *summed* over label tokens
    (over all attended ones where there are no labels), so that batching does not change a score.

    Each expert of a mixture is a module of its own. Its activation is without the routing weight,
    and the tokens routed to it are the ones that count. Experts with fewer than two have a score
    of 0 and are named in a warning; :meth:`Attribution.scarce` finds them, and others with few.

    The first two run the backbone alone, forward; the others need gradients of activations, never
    of weights. The model runs in evaluation mode and in its own dtype (also where a Trainer has
    left autocast on it), and is left as it was. Hooks of others count: what enters B is what B's
    own pre-hooks made of it. One thread at a time may run a model. Layers for which gradient
    checkpointing is on are computed again in the backward pass of the gradient metrics.

    A quantised model of a scheme of :mod:`ssah.models.packed` runs packed, as it would;
    norms are those of B's dequantised weight, and gradients those that its modules pass on.

    Where a process group is initialised, every rank calls this with batches of its own
    (:func:`ssah.distributed.deal`), some or none, and gets the scores of all of them together, to
    the same bits.

    Args:
        model: a transformers model of a known family.
        loader: yields what the model takes: mappings with ``input_ids`` and optionally
            ``attention_mask`` and ``labels``. Padding never counts.
        metric: ``"variance"``, ``"norm"``, ``"taylor"`` or ``"fisher"``.
        modules: which kinds of depth-2 module, of ``"mlp"`` and ``"attention"``.
        tokens: which positions count. ``"labels"``: those whose own label is not -100;
            ``"all"``: every attended one; ``"after_first"``: all but the first of each text (BOS,
            whose activations dwarf others); ``"auto"``: labels if the first batch has them.
        all_experts: run every expert on every token and count it for all of them; what the model
            computes stays what it is. Not for gradient metrics: there is no gradient at an expert
            that did not contribute.
        progress: show a bar with tokens per second on standard error; of several ranks, the first
            one.
        process_group: the ranks that score together: a process group of ``torch.distributed``,
            ``"auto"`` (the default group, if one is initialised) or None (this process alone).
        resume_dir: a folder that keeps the sums over the batches so far, each rank its own. The
            same call with the same folder goes on after the last batch that was kept, and gives the
            same bits. It is not removed: do so when the result is saved.
        save_every_seconds: seconds between two writes to ``resume_dir`` at least, 0: after each
            batch.

    Raises, on every rank if on one:
        TypeError: ``model`` is no transformers model, or the loader yields something else.
        ValueError: an unknown option or architecture, an empty loader, no position that counts,
            a single token (no variance), labels missing, ``all_experts`` without experts; packed
            weights that pass no gradient or cannot be dequantised; ranks that differ in model or
            options, or that were all given the same batches; a ``resume_dir`` that is damaged, of
            another run or in use by one, or a loader that does not yield its batches again.
        OSError: ``resume_dir`` cannot be written; what it was before is still there.
        FloatingPointError: NaN or infinite activations, gradients or weights; the module is named.
        RuntimeError: a module never ran; a rank has died.
    """
    ranks = Ranks.of(process_group)
    with ranks.agreeing():
        kinds = (modules,) if isinstance(modules, str) else tuple(modules)
        if not save_every_seconds >= 0:
            raise ValueError(
                f"save_every_seconds is {save_every_seconds}, must be 0 or more seconds"
            )
    resumes = resume_dir is not None
    run = Run(model, loader, ranks, metric, kinds, tokens, all_experts, resumes)
    with ExitStack() as stack:
        if resume_dir is not None:
            run.resume(resume_dir, save_every_seconds, stack)
        run.run(progress)
    return score_all(
        run.model,
        run.modules,
        run.sums,
        run.join(),
        metric=metric,
        tokens=run.tokens,
        fingerprint=str(run.tally.fingerprint),
        all_experts=all_experts,
        weights_hash=run.weights_hash,
    )
