"""How important every unit is on a data set: ``attribute`` and its result."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution.backward import forward_backward
from ssah.attribution.batches import (
    IGNORED,
    Batch,
    Fingerprint,
    counted_tokens,
    n_embeddings,
    read_batch,
)
from ssah.attribution.joining import join
from ssah.attribution.positions import with_positions
from ssah.attribution.resuming import BatchState
from ssah.attribution.sharded import check_sharded, nothing, run_sharded
from ssah.attribution.watch import Sums, check_finite, check_ran, watching
from ssah.compat.transformers import attention_implementation
from ssah.distributed import Group, Ranks, reshard
from ssah.models import (
    as_it_was,
    at_hand,
    cheap_weights_hash,
    check_backbone,
    dequantised,
    device_of,
    packed_modules,
    passing_gradients,
    weights_hash,
)
from ssah.progress import token_bar
from ssah.storage import FORMAT, TEXT, Fields, Stored, check_fields, save_tensors
from ssah.units import (
    FAMILIES,
    KINDS,
    DepthTwoModule,
    check_same_model,
    config_hash,
    find_modules,
    model_name,
    units_hash,
)
from ssah.version import __version__
from ssah_kernels import ops
from ssah_kernels.sharded import is_sharded

__all__ = ["METRICS", "TOKENS", "Attribution", "attribute"]

METRICS: tuple[str, ...] = ("variance", "norm", "taylor", "fisher")
TOKENS: tuple[str, ...] = ("auto", "all", "after_first", "labels")
_GRADIENT_METRICS = ("taylor", "fisher")
CONTENT = "attribution"  # of a folder with scores
_FIELDS: Fields = {
    "metric": str,
    "tokens": str,
    "model_name": str,
    "units_hash": TEXT,
    "weights_hash": TEXT,
    "data_fingerprint": str,
    "all_experts": bool,
    "version": str,
    "count": dict,
    "rows_read": (dict, type(None)),
}
_OF_LATER = dict.fromkeys(("units_hash", "weights_hash", "rows_read"))  # None in older results


@dataclass(frozen=True, eq=False)
class Attribution:
    """Importance of every unit of a model on one data set. All tensors are float64 on the CPU.

    Attributes:
        scores: B's name -> ``[n_units]``, the importance under ``metric``.
        mean: B's name -> ``[n_units]``, mean over tokens of the activation entering B (0 where
            no token was counted).
        variance: B's name -> ``[n_units]``, its unbiased variance (NaN for a single token).
        count: B's name -> number of tokens counted; of an expert, those routed to it.
        metric: ``"variance"``, ``"norm"``, ``"taylor"`` or ``"fisher"``.
        tokens: ``"all"``, ``"after_first"`` or ``"labels"``: which positions counted.
        model_name: hub id, path or class of the model.
        units_hash: of its units, see `ssah.units.units_hash`; None in results of before.
        data_fingerprint: of the loader, or of the tokens and labels seen.
        all_experts: whether every token was counted for every expert, not the routed ones alone.
        weights_hash: of the weights (`ssah.models.weights`); None in older results, and of
            models that are sharded, offloaded or streamed.
        version: of this library.
        rows_read: what ``ssah attribute`` keeps of its rows: how many it left out and cut, and the
            chat template. None where no command made it.
        signed: B's name -> ``[n_units]``, the sum over tokens of a * dL/da: above 0 where the loss
            (in nats) falls, to first order, as the unit is removed. None unless the metric is
            ``"taylor"``, whose score is its absolute value, or ``"fisher"``.
    """

    scores: dict[str, Tensor]
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    count: dict[str, int]
    metric: str
    tokens: str
    model_name: str
    units_hash: str | None
    data_fingerprint: str
    all_experts: bool = False
    weights_hash: str | None = None
    version: str = __version__
    rows_read: dict[str, Any] | None = None
    signed: dict[str, Tensor] | None = None

    def scarce(self, least: int = 2) -> dict[str, int]:
        """Modules of which fewer than ``least`` tokens were counted, and how many were.

        With a mixture of experts these are the experts that the data hardly reached. Of none or
        one token there is no variance: the score is 0 then.
        """
        return {name: count for name, count in self.count.items() if count < least}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write to ``directory`` as safetensors and JSON: whole, or not at all."""
        tensors = {
            f"{kind}/{name}": tensor
            for kind in ("scores", "mean", "variance", "signed")
            for name, tensor in (getattr(self, kind) or {}).items()
        }
        meta = {
            "content": CONTENT,
            "format": FORMAT,
            "version": self.version,
            "metric": self.metric,
            "tokens": self.tokens,
            "model_name": self.model_name,
            "units_hash": self.units_hash,
            "weights_hash": self.weights_hash,
            "data_fingerprint": self.data_fingerprint,
            "all_experts": self.all_experts,
            "count": self.count,
            "rows_read": self.rows_read,
        }
        save_tensors(directory, tensors, meta)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module | None = None) -> Attribution:
        """Read what :meth:`save` wrote.

        Args:
            directory: the folder.
            model: refuse the result unless it was made on a model of this configuration.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the folder holds something else, is damaged (the file and the field are
                named), or belongs to another model.
        """
        stored = Stored(directory, CONTENT, _FIELDS, _OF_LATER)
        stored.choice("metric", METRICS)
        stored.choice("tokens", TOKENS)
        meta, names = stored.meta, stored.names("count")
        check_fields(stored.path, meta["count"], dict.fromkeys(names, int))
        kinds: dict[str, dict[str, Tensor]] = {"scores": {}, "mean": {}, "variance": {}}
        for name in names:
            score = stored.tensor(f"scores/{name}")
            kinds["scores"][name] = score
            kinds["mean"][name] = stored.tensor(f"mean/{name}", shape=(len(score),))
            # Of a single token there is no variance: it is NaN.
            kinds["variance"][name] = stored.tensor(
                f"variance/{name}", shape=(len(score),), finite=meta["count"][name] > 1
            )
        # Not of every metric, nor in results of before.
        if any(key.startswith("signed/") for key in stored.tensors):
            kinds["signed"] = {
                name: stored.tensor(f"signed/{name}", shape=(len(score),))
                for name, score in kinds["scores"].items()
            }
        known = {field.name for field in fields(cls)}
        told = {key: value for key, value in meta.items() if key in known}
        attribution = cls(**{**told, **kinds})
        if model is not None:
            attribution.check_model(model)
        return attribution

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError, with the reason, unless the scores belong to ``model``'s units."""
        check_same_model(model, self.units_hash, expected_name=self.model_name, what="attribution")
        found = find_modules(model)
        for name, score in self.scores.items():
            if name not in found or found[name].n_units != len(score):
                raise ValueError(
                    f"attribution has {len(score)} units in {name!r}, the model "
                    f"{type(model).__name__} has {found[name].n_units if name in found else 'none'}"
                )


def attribute(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    metric: str = "variance",
    modules: Iterable[str] = KINDS,
    tokens: str = "auto",
    all_experts: bool = False,
    progress: bool = False,
    group: Group = "auto",
    state: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
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
    own pre-hooks made of it. One thread at a time may run a model.

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
        group: the ranks that score together: a process group of ``torch.distributed``, ``"auto"``
            (the default group, if one is initialised) or None (this process alone).
        state: a folder that keeps the sums over the batches so far, each rank its own. The same
            call with the same folder goes on after the last batch that was kept, and gives the
            same bits. It is not removed: do so when the result is saved.
        save_every: seconds between two writes to ``state`` at least, 0: after each batch.

    Raises, on every rank if on one:
        TypeError: ``model`` is no transformers model, or the loader yields something else.
        ValueError: an unknown option or architecture, an empty loader, no position that counts,
            a single token (no variance), labels missing, ``all_experts`` without experts; packed
            weights that pass no gradient or cannot be dequantised; ranks that differ in model or
            options, or that were all given the same batches; a ``state`` that is damaged, of
            another run or in use by one, or a loader that does not yield its batches again.
        OSError: ``state`` cannot be written; what it was before is still there.
        FloatingPointError: NaN or infinite activations, gradients or weights; the module is named.
        RuntimeError: a module never ran; a rank has died.
    """
    ranks = Ranks.of(group)
    gradient = metric in _GRADIENT_METRICS
    with ranks.agreeing():
        check_option("metric", metric, METRICS)
        check_option("tokens", tokens, TOKENS)
        if not save_every >= 0:
            raise ValueError(f"save_every is {save_every}, must be 0 or more seconds")
        modules = (modules,) if isinstance(modules, str) else tuple(modules)
        found = find_modules(model, modules)
        assert isinstance(model, PreTrainedModel)
        over = Ranks.over(model)
        if gradient and model.get_output_embeddings() is None:
            raise ValueError(
                f"metric is {metric!r}, which needs a loss, but {type(model).__name__} has no "
                "vocabulary projection; load it with AutoModelForCausalLM"
            )
        if all_experts and (gradient or not any(module.routed for module in found.values())):
            where = (
                f"for the metric {metric!r}" if gradient else "for a model without routed experts"
            )
            raise ValueError(f"all_experts is True, must be False {where}")
        if over is None:
            check_backbone(model)
        else:
            check_sharded(model, found, ranks, over)
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"loader is {type(loader).__name__}, must yield batches, as a DataLoader does"
            )
        n_expected = operator.length_hint(loader, 0) or None  # before the first is taken
        batches = iter(loader)
        begun = list(islice(batches, 1))
        if tokens == "auto" and begun:
            tokens = counted_tokens(begun[0])
        hashed = cheap_weights_hash(model)
    facts = ranks.common(
        metric=metric,
        tokens=None if tokens == "auto" else tokens,
        modules=len(found),
        all_experts=all_experts,
        config_hash=config_hash(model),
        state=state is not None,
        weights_hash=hashed,  # ranks that hold different weights would score no model at all
    )
    tokens = facts["tokens"] or tokens
    with torch.inference_mode(False):
        sums = {name: Sums.zeros(module) for name, module in found.items()}
    fingerprint = Fingerprint()
    loaders = set(ranks.tell(getattr(loader, "fingerprint", None)))
    own_fingerprint = loaders.pop() if len(loaders) == 1 else None
    packed = bool(packed_modules(model))
    # Of a packed model even what padding computes may be seen: a scale may be a batch's.
    maskless = may_drop_mask(model) and not packed
    device = device_of(model.get_input_embeddings())
    vocab_size = n_embeddings(model)
    n_batches = counted = n_targets = 0
    kept: BatchState | None = None
    if state is not None:
        with ranks.agreeing():
            identity = {
                "version": __version__,
                "torch": torch.__version__,
                "model": facts["config_hash"],
                "weights": facts["weights_hash"] or weights_hash(model),
                "attention": attention_implementation(model),
                "dtype": str(model.dtype),
                "device": device.type,
                "metric": metric,
                "modules": sorted(modules),
                "tokens": tokens,
                "all_experts": all_experts,
                "data": own_fingerprint,
            }
            kept = BatchState(
                Path(state), identity, sums, ranks=ranks, gradient=gradient, every=save_every
            )

    def read() -> Iterator[Batch]:
        """The batches that are to run; where the forward pass is collective, an error in here is
        told to the other ranks before any goes on."""
        nonlocal n_batches, counted, n_targets
        for number, raw in enumerate(chain(begun, batches)):
            batch = read_batch(
                raw,
                number,
                tokens=tokens,
                maskless=maskless,
                device=device,
                vocab_size=vocab_size,
            )
            batch = with_positions(model, batch)
            n_batches += 1
            counted += int(batch.token_mask.sum())
            if own_fingerprint is None:
                fingerprint.update(batch)
            if kept is not None and kept.has(raw):
                n_targets += int((batch.targets() != IGNORED).sum())
                continue
            yield batch
            if kept is not None:
                kept.add()
        if kept is not None:
            kept.end()

    with ranks.agreeing(), ExitStack() as stack:
        if kept is not None:
            stack.callback(kept.close)
        shown = progress and ranks.rank == 0
        done = 0 if kept is None else kept.done
        advance = stack.enter_context(token_bar(n_expected, done)) if shown else None
        stack.enter_context(as_it_was(model))
        watch = stack.enter_context(
            watching(found, sums, gradient=gradient, all_experts=all_experts)
        )
        stack.callback(reshard, model)
        if gradient:
            stack.enter_context(passing_gradients(model))
        # The forward pass of a sharded model waits for the other ranks.
        for batch in read() if over is None else ranks.in_step(read()):
            batch = batch or nothing(device)
            watch.read(batch)
            if over is not None:
                n_targets += run_sharded(model, batch, watch)
            elif gradient:
                n_targets += forward_backward(model, batch, watch)
            else:
                # What packed modules lay out anew as they first run must not be inference tensors.
                with torch.no_grad() if packed else torch.inference_mode():
                    model.base_model(**batch.inputs, use_cache=False)
            if advance is not None:
                advance(int(batch.attended.sum()))
        check_finite(sums, gradient)
    seen = ranks.tell([n_batches, counted, n_targets, fingerprint.hexdigest()])
    n_batches, counted, n_targets = (sum(each[i] for each in seen) for i in range(3))
    check_loader(n_batches, counted, metric=metric, tokens=tokens)
    if gradient and n_targets == 0:
        raise ValueError("loader has no token to predict: the loss is empty")
    join(ranks, sums, gradient=gradient)
    check_ran(found, sums)
    norms: dict[str, Tensor] = {}
    with ranks.agreeing():
        if not gradient:
            norms = {name: column_sq_norms(module) for name, module in found.items()}
    return finish(
        model,
        found,
        sums,
        norms,
        metric=metric,
        tokens=tokens,
        fingerprint=str(own_fingerprint or Fingerprint.total(each[3] for each in seen)),
        all_experts=all_experts,
        weights_hash=facts["weights_hash"],
    )


def check_loader(n_batches: int, counted: int, *, metric: str, tokens: str) -> None:
    """Raise ValueError unless the loader gave what ``metric`` needs.

    Args:
        n_batches: how many it yielded.
        counted: positions that count in all of them.
        metric, tokens: as `attribute` takes them, ``tokens`` resolved.
    """
    if n_batches == 0:
        raise ValueError(
            "loader yielded no batch, must yield at least one (a generator runs only once)"
        )
    if counted == 0:
        raise ValueError(
            f"loader has no position that counts with tokens={tokens!r}: every position is "
            "padding" + (" or has the label -100" if tokens == "labels" else "")
        )
    if counted == 1 and metric == "variance":
        raise ValueError("loader has a single token that counts, must have two for a variance")


def finish(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    sums: Mapping[str, Sums],
    norms: Mapping[str, Tensor],
    *,
    metric: str,
    tokens: str,
    fingerprint: str,
    all_experts: bool = False,
    weights_hash: str | None = None,
) -> Attribution:
    """The result on ``model``, of the sums over all batches; warns of experts hardly reached.

    Args:
        model: only its configuration matters.
        modules: B's name -> module.
        sums: B's name -> sums.
        norms: B's name -> `column_sq_norms`; not needed for gradient metrics.
        metric, tokens, all_experts: as `attribute` takes them, ``tokens`` resolved.
        fingerprint: of the data.
        weights_hash: of the weights that were scored, if anybody knows it.
    """
    attribution = Attribution(
        scores={name: _score(metric, sums[name], norms.get(name)).cpu() for name in modules},
        mean={name: sums[name].mean.cpu() for name in modules},
        variance={name: _variance(sums[name]).cpu() for name in modules},
        count={name: int(sums[name].count) for name in modules},
        metric=metric,
        tokens=tokens,
        model_name=model_name(model),
        units_hash=units_hash(model),
        data_fingerprint=fingerprint,
        all_experts=all_experts,
        weights_hash=weights_hash,
        signed={name: sums[name].signed.cpu() for name in modules}
        if metric in _GRADIENT_METRICS
        else None,
    )
    scarce = [name for name in attribution.scarce() if modules[name].routed]
    if scarce:
        warnings.warn(
            f"{len(scarce)} of {len(modules)} modules are experts that fewer than two of the "
            f"counted tokens were routed to, {scarce[0]!r} for one: a variance there is 0 (see "
            "Attribution.scarce; more data reaches them, or all_experts=True)",
            stacklevel=3,
        )
    return attribution


def check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")


def may_drop_mask(model: PreTrainedModel) -> bool:
    """Whether a right-padded batch may run without its attention mask."""
    config = model.config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)  # of an unknown one nothing is known
    causal = getattr(config, "is_causal", True)
    both_ways = getattr(config, "use_bidirectional_attention", False)
    return family is not None and family.maskless and causal and not both_ways


def _variance(sums: Sums) -> Tensor:
    return sums.m2 / (sums.count - 1) if sums.count > 1 else torch.full_like(sums.m2, math.nan)


def _score(metric: str, sums: Sums, norms: Tensor | None) -> Tensor:
    if metric == "taylor":
        return sums.signed.abs()
    if metric == "fisher":
        return sums.squared
    if sums.count < (2 if metric == "variance" else 1):  # an expert that was hardly reached
        return torch.zeros_like(sums.m2)
    assert norms is not None
    moment = _variance(sums) if metric == "variance" else sums.m2 / sums.count + sums.mean.square()
    return moment * norms


def column_sq_norms(module: DepthTwoModule) -> Tensor:
    """Squared norm of every column of B, float64 ``[n_units]``.

    Raises:
        FloatingPointError: the weight is NaN or infinite.
        ValueError: it is packed in a layout that cannot be dequantised.
    """
    with at_hand(module.down):
        plain = dequantised(module.down)
        weight = module.weight.detach() if plain is None else plain
        if is_sharded(weight):
            weight = weight.full_tensor()
        if module.output.dim == 1:
            norms = ops.column_sq_norms(weight)
        else:
            # Conv1D holds the columns of B as rows. Chunked: no float64 copy of the whole weight.
            norms = torch.cat([rows.double().square().sum(1) for rows in weight.split(256)])
    if not bool(norms.isfinite().all()):
        raise FloatingPointError(f"the weight of {module.name!r} is NaN or infinite")
    return norms
