"""How important every unit is on a data set: ``attribute`` and its result."""

from __future__ import annotations

import math
import operator
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ssah import __version__
from ssah.batches import IGNORED, Batch, Fingerprint, read_batch
from ssah.causal_attention import FastCausalBackward
from ssah.distributed import Group, Ranks, reshard
from ssah.provenance import (
    check_same_model,
    config_hash,
    load_tensors,
    model_name,
    save_tensors,
)
from ssah.sharded_scoring import check_sharded, nothing, run_sharded
from ssah.units import KINDS, DepthTwoModule, family_of, find_modules
from ssah.watch import Sums, as_it_was, watching
from ssah_kernels import ops
from ssah_kernels.sharded import is_sharded

__all__ = ["METRICS", "TOKENS", "Attribution", "attribute", "config_hash"]

METRICS: tuple[str, ...] = ("variance", "norm", "taylor", "fisher")
TOKENS: tuple[str, ...] = ("auto", "all", "labels")
_GRADIENT_METRICS = ("taylor", "fisher")
_CONTENT = "attribution"
_LOGITS_AT_ONCE = 2**23  # elements: 32 MiB in float32


@dataclass(frozen=True, eq=False)
class Attribution:
    """Importance of every unit of a model on one data set. All tensors are float64 on the CPU.

    Attributes:
        scores: B's name -> ``[n_units]``, the importance under ``metric``.
        mean: B's name -> ``[n_units]``, mean over tokens of the activation entering B.
        variance: B's name -> ``[n_units]``, its unbiased variance (NaN for a single token).
        count: B's name -> number of tokens counted.
        metric: ``"variance"``, ``"norm"``, ``"taylor"`` or ``"fisher"``.
        tokens: ``"all"`` or ``"labels"``: which positions counted.
        model_name: hub id, path or class of the model.
        config_hash: of its configuration.
        data_fingerprint: of the loader, or of the tokens and labels seen.
        version: of this library.
    """

    scores: dict[str, Tensor]
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    count: dict[str, int]
    metric: str
    tokens: str
    model_name: str
    config_hash: str
    data_fingerprint: str
    version: str = __version__

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write to ``directory`` as safetensors and JSON: whole, or not at all."""
        tensors = {
            f"{kind}/{name}": tensor
            for kind in ("scores", "mean", "variance")
            for name, tensor in getattr(self, kind).items()
        }
        meta = {
            "content": _CONTENT,
            "version": self.version,
            "metric": self.metric,
            "tokens": self.tokens,
            "model_name": self.model_name,
            "config_hash": self.config_hash,
            "data_fingerprint": self.data_fingerprint,
            "count": self.count,
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
            ValueError: the folder holds something else, or belongs to another model.
        """
        tensors, meta = load_tensors(directory)
        if meta.pop("content", None) != _CONTENT:
            raise ValueError(f"directory {str(directory)!r} does not hold an attribution")
        names = list(meta["count"])
        kinds = {
            kind: {name: tensors[f"{kind}/{name}"] for name in names}
            for kind in ("scores", "mean", "variance")
        }
        attribution = cls(**{**kinds, **meta})
        if model is not None:
            attribution.check_model(model)
        return attribution

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError, with the reason, unless the scores belong to ``model``'s units."""
        check_same_model(model, self.config_hash, expected_name=self.model_name, what="attribution")
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
    progress: bool = False,
    group: Group = "auto",
) -> Attribution:
    """Score every unit of ``model`` on the data of ``loader``, in one pass over it.

    The activation entering B is a, of unit j at token t. ``"variance"``: unbiased variance of a_j
    over tokens times the squared norm of column j of B (SSAH, arXiv 2410.10862, eq. 1).
    ``"norm"``: the same with the mean of a_j^2 (Wanda, arXiv 2306.11695, structured). ``"taylor"``:
    absolute value of the sum over tokens of a_j * dL/da_j (arXiv 1906.10771). ``"fisher"``: sum
    over tokens of (a_j * dL/da_j)^2. L is the next-token loss in nats, *summed* over label tokens
    (over all attended ones where there are no labels), so that batching does not change a score.

    The first two run the backbone alone, forward; the others need gradients of activations, never
    of weights. The model runs in evaluation mode and in its own dtype, and is left as it was.

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
            ``"all"``: every attended one; ``"auto"``: labels if the first batch has them.
        progress: show a bar with tokens per second; of several ranks, the first one.
        group: the ranks that score together: a process group of ``torch.distributed``, ``"auto"``
            (the default group, if one is initialised) or None (this process alone).

    Raises, on every rank if on one:
        TypeError: ``model`` is no transformers model, or the loader yields something else.
        ValueError: an unknown option or architecture, an empty loader, no position that counts,
            a single token (no variance), labels missing; ranks that differ in model or options,
            or that were all given the same batches.
        FloatingPointError: NaN or infinite activations, gradients or weights; the module is named.
        RuntimeError: a module never ran; a rank has died.
    """
    ranks = Ranks.of(group)
    gradient = metric in _GRADIENT_METRICS
    with ranks.agreeing():
        _check_option("metric", metric, METRICS)
        _check_option("tokens", tokens, TOKENS)
        found = find_modules(model, modules)
        assert isinstance(model, PreTrainedModel)
        over = Ranks.over(model)
        if gradient and model.get_output_embeddings() is None:
            raise ValueError(
                f"metric is {metric!r}, which needs a loss, but {type(model).__name__} has no "
                "vocabulary projection; load it with AutoModelForCausalLM"
            )
        if over is not None:
            check_sharded(model, found, ranks, over)
        batches = iter(loader)
        begun = list(islice(batches, 1))
        if tokens == "auto" and begun:
            labelled = isinstance(begun[0], Mapping) and begun[0].get("labels") is not None
            tokens = "labels" if labelled else "all"
    facts = ranks.common(
        metric=metric,
        tokens=None if tokens == "auto" else tokens,
        modules=len(found),
        config_hash=config_hash(model),
    )
    tokens = facts["tokens"] or tokens
    with torch.inference_mode(False):
        sums = {name: Sums.zeros(module) for name, module in found.items()}
    fingerprint = Fingerprint()
    loaders = set(ranks.tell(getattr(loader, "fingerprint", None)))
    own_fingerprint = loaders.pop() if len(loaders) == 1 else None
    maskless = _may_drop_mask(model)
    device = model.get_input_embeddings().weight.device
    assert isinstance(device, torch.device)
    n_batches = counted = n_targets = 0

    def read() -> Iterator[Batch]:
        for number, raw in enumerate(chain(begun, batches)):
            yield read_batch(raw, number, tokens=tokens, maskless=maskless, device=device)

    with ranks.agreeing(), ExitStack() as stack:
        shown = progress and ranks.rank == 0
        advance = stack.enter_context(_progress(loader)) if shown else None
        stack.enter_context(as_it_was(model))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        watch = stack.enter_context(watching(found, sums, gradient=gradient))
        stack.callback(reshard, model)
        # The forward pass of a sharded model waits for the other ranks.
        for batch in read() if over is None else ranks.in_step(read()):
            n_batches += batch is not None
            if own_fingerprint is None and batch is not None:
                fingerprint.update(batch)
            batch = batch or nothing(device)
            counted += int(batch.token_mask.sum())
            watch.read(batch)
            if over is not None:
                n_targets += run_sharded(model, batch, gradient)
            elif gradient:
                n_targets += _forward_backward(model, batch)
            else:
                with torch.inference_mode():
                    model.base_model(**batch.inputs, use_cache=False)
            if advance is not None:
                advance(int(batch.attended.sum()))
        _check_finite(sums, gradient)
    seen = ranks.tell([n_batches, counted, n_targets, fingerprint.hexdigest()])
    n_batches, counted, n_targets = (sum(each[i] for each in seen) for i in range(3))
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
    if gradient and n_targets == 0:
        raise ValueError("loader has no token to predict: the loss is empty")
    ranks.join(sums, gradient=gradient)
    with ranks.agreeing():
        scores = {name: _score(metric, found[name], sums[name]).cpu() for name in found}
    return Attribution(
        scores=scores,
        mean={name: sums[name].mean.cpu() for name in found},
        variance={name: _variance(sums[name]).cpu() for name in found},
        count={name: int(sums[name].count) for name in found},
        metric=metric,
        tokens=tokens,
        model_name=model_name(model),
        config_hash=config_hash(model),
        data_fingerprint=str(own_fingerprint or Fingerprint.total(each[3] for each in seen)),
    )


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")


def _may_drop_mask(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    causal = getattr(config, "is_causal", True)
    both_ways = getattr(config, "use_bidirectional_attention", False)
    return family_of(model).maskless and causal and not both_ways


def _forward_backward(model: PreTrainedModel, batch: Batch) -> int:
    """Run one batch through backbone, loss and back; the number of tokens predicted."""
    with torch.inference_mode(False), torch.enable_grad(), FastCausalBackward():
        output = model.base_model(**batch.inputs, use_cache=False, return_dict=True)
        hidden = output.last_hidden_state  # [rows, length, hidden]
        targets = batch.targets().to(hidden.device)
        n_targets = int((targets != IGNORED).sum())
        if n_targets:
            torch.autograd.backward(hidden, _loss_gradient(model, output, targets))
    return n_targets


def _loss_gradient(model: PreTrainedModel, output: ModelOutput, targets: Tensor) -> Tensor:
    """d(summed next-token loss) / d(last hidden state), ``[rows, length, hidden]``.

    Only the positions that predict something pass through the vocabulary projection, a chunk at a
    time. dL/dlogits is softmax(logits) - onehot(target); the loss itself is never needed.
    """
    states = output["last_hidden_state"].detach().flatten(0, 1)  # [tokens, hidden]
    gradient = torch.zeros_like(states)
    positions = (targets.flatten() != IGNORED).nonzero()[:, 0]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    with _head(model, output) as head:
        for chunk in positions.split(max(1, _LOGITS_AT_ONCE // vocabulary)):
            state = states[chunk][None].requires_grad_()  # [1, tokens, hidden]
            logits = head(state)  # [1, tokens, vocabulary]
            slope = torch.softmax(logits.detach(), dim=-1, dtype=torch.float32)
            slope[0, torch.arange(len(chunk), device=slope.device), targets.flatten()[chunk]] -= 1
            (state_gradient,) = torch.autograd.grad(logits, state, slope.to(logits.dtype))
            gradient[chunk] = state_gradient[0]
    return gradient.view_as(output["last_hidden_state"])


@contextmanager
def _head(model: PreTrainedModel, output: ModelOutput) -> Iterator[Any]:
    """What the model does with its backbone's output: a function from states to logits.

    The model's own forward with the backbone replaced: whatever it does to the logits (soft
    capping, scaling) is done here too.
    """
    fields = dict(output)

    def backbone(*_: Any, **__: Any) -> ModelOutput:
        return type(output)(**fields)

    def head(state: Tensor) -> Tensor:
        fields["last_hidden_state"] = state
        ids = torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device)
        return model(input_ids=ids, use_cache=False, return_dict=True).logits

    with ExitStack() as stack:
        for module in {model.base_model, model.get_decoder()}:
            stack.callback(_restore_forward, module, vars(module).get("forward"))
            module.forward = backbone
        yield head


def _restore_forward(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _check_finite(sums: Mapping[str, Sums], gradient: bool) -> None:
    for name, state in sums.items():
        if not _finite(state.mean, state.m2):
            raise FloatingPointError(f"activations that enter {name!r} are NaN or infinite")
    for name, state in reversed(list(sums.items())) if gradient else ():
        if not _finite(state.signed, state.squared):
            raise FloatingPointError(f"gradients at the input of {name!r} are NaN or infinite")


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _variance(sums: Sums) -> Tensor:
    return sums.m2 / (sums.count - 1) if sums.count > 1 else torch.full_like(sums.m2, math.nan)


def _score(metric: str, module: DepthTwoModule, sums: Sums) -> Tensor:
    if not sums.count:
        raise RuntimeError(f"module {module.name!r} never ran: its units have no score")
    if metric == "taylor":
        return sums.signed.abs()
    if metric == "fisher":
        return sums.squared
    norms = _column_sq_norms(module)
    if not _finite(norms):
        raise FloatingPointError(f"the weight of {module.name!r} is NaN or infinite")
    moment = _variance(sums) if metric == "variance" else sums.m2 / sums.count + sums.mean.square()
    return moment * norms


def _column_sq_norms(module: DepthTwoModule) -> Tensor:
    """Squared norm of every column of B, float64 ``[n_units]``."""
    weight = module.down.weight
    assert isinstance(weight, Tensor)
    if is_sharded(weight):
        weight = weight.full_tensor()
    if module.output.dim == 1:
        return ops.column_sq_norms(weight.detach())
    # Conv1D holds the columns of B as rows. Chunked: no float64 copy of the whole weight.
    return torch.cat([rows.double().square().sum(1) for rows in weight.detach().split(256)])


@contextmanager
def _progress(loader: Iterable[Any]) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("scoring units"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    start, seen = time.perf_counter(), 0
    with Progress(*columns) as bar:
        task = bar.add_task("", total=operator.length_hint(loader, 0) or None, rate=0.0)

        def advance(n_tokens: int) -> None:
            nonlocal seen
            seen += n_tokens
            bar.update(task, advance=1, rate=seen / (time.perf_counter() - start))

        yield advance
