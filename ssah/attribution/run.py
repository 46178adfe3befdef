"""One call of ``attribute`` on one rank: checked, resumed, run, and joined with the other ranks."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution.batches import Batch, BatchReader, counted_tokens
from ssah.attribution.forward_backward import check_sharded, nothing, run_batch
from ssah.attribution.result import GRADIENT_METRICS, METRICS, TOKENS
from ssah.attribution.resuming import BatchState, run_identity
from ssah.attribution.scores import all_column_sq_norms
from ssah.attribution.sums import check_finite, check_ran, join, new_sums, on_host
from ssah.attribution.tally import Tally
from ssah.attribution.watch import watching
from ssah.choices import check_choice
from ssah.distributed import Ranks, reshard
from ssah.models import (
    as_it_was,
    cheap_weights_hash,
    check_backbone,
    packed_modules,
    passing_gradients,
    recomputing,
)
from ssah.progress import token_bar
from ssah.units import config_hash, find_modules


class Run:
    """What is scored on what, and what has been seen of it so far.

    Attributes:
        model: the model.
        modules: B's name -> module.
        sums: B's name -> its sums over the batches so far; on the host once all have run.
        tokens: which positions count, ``"auto"`` resolved.
        weights_hash: of the model's weights; None where it would have to be computed.
        tally: what the batches so far held.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Mapping[str, Any]],
        ranks: Ranks,
        metric: str,
        kinds: tuple[str, ...],
        tokens: str,
        all_experts: bool,
        resumes: bool,
    ) -> None:
        """Check a call on this rank, and that the other ranks were called alike.

        Arguments and errors as of ``attribute``; ``resumes``: whether it has a folder for that.
        """
        self.ranks, self.metric, self.kinds, self.all_experts = ranks, metric, kinds, all_experts
        self.gradient = metric in GRADIENT_METRICS
        with ranks.agreeing():
            check_choice("metric", metric, METRICS)
            check_choice("tokens", tokens, TOKENS)
            self.modules = find_modules(model, kinds)
            assert isinstance(model, PreTrainedModel)
            self.model = model
            self._check_model()
            if not isinstance(loader, Iterable):
                raise TypeError(
                    f"loader is {type(loader).__name__}, must yield batches, as a DataLoader does"
                )
            self._n_expected = operator.length_hint(loader, 0) or None  # before one is taken
            batches = iter(loader)
            begun = list(islice(batches, 1))
            self._batches = chain(begun, batches)
            if tokens == "auto" and begun:
                tokens = counted_tokens(begun[0])
            hashed = cheap_weights_hash(model)
        facts = ranks.common(
            metric=metric,
            # A rank without a batch cannot tell what "auto" means: the others do.
            tokens=None if tokens == "auto" else tokens,
            modules=len(self.modules),
            all_experts=all_experts,
            config_hash=config_hash(model),
            resume_dir=resumes,
            weights_hash=hashed,  # ranks that hold different weights would score no model at all
        )
        self.tokens, self.weights_hash = facts["tokens"] or tokens, facts["weights_hash"]
        # Loaders that are shares of one data set know the fingerprint of all of it.
        known = set(ranks.tell(getattr(loader, "fingerprint", None)))
        self.tally = Tally(known.pop() if len(known) == 1 else None)
        with torch.inference_mode(False):  # else they could not change outside of the caller's
            self.sums = new_sums(self.modules)
        self._packed = bool(packed_modules(model))
        # Of a packed model even what padding computes may be seen: a scale may be a batch's.
        self._reader = BatchReader(model, tokens=self.tokens, keep_mask=self._packed)
        self._state: BatchState | None = None

    def _check_model(self) -> None:
        """Raise ValueError where the model cannot give what the metric needs."""
        over = Ranks.over(self.model)
        self._sharded = over is not None
        if self.gradient and self.model.get_output_embeddings() is None:
            raise ValueError(
                f"metric is {self.metric!r}, which needs a loss, but {type(self.model).__name__} "
                "has no vocabulary projection; load it with AutoModelForCausalLM"
            )
        routed = any(module.routed for module in self.modules.values())
        if self.all_experts and (self.gradient or not routed):
            gradient = f"the metric {self.metric!r}"
            where = gradient if self.gradient else "a model without routed experts"
            raise ValueError(f"all_experts is True, must be False for {where}")
        if over is None:
            check_backbone(self.model)
        else:
            check_sharded(self.model, self.modules, self.ranks, over)

    def resume(self, folder: str | os.PathLike[str], every: float, stack: ExitStack) -> None:
        """Take over what an interrupted run has left in ``folder``, and keep there what follows.

        Args:
            folder: of all ranks; nobody else uses it until ``stack`` is closed.
            every: seconds between two writes at least.
            stack: of the call.
        """
        with self.ranks.agreeing():
            identity = run_identity(
                self.model,
                self._reader.device,
                self.weights_hash,
                metric=self.metric,
                modules=sorted(self.kinds),
                tokens=self.tokens,
                all_experts=self.all_experts,
                data=self.tally.fingerprint,
            )
            self._state = BatchState(
                Path(folder),
                identity,
                self.sums,
                ranks=self.ranks,
                gradient=self.gradient,
                every=every,
            )
            stack.callback(self._state.close)

    def run(self, progress: bool) -> None:
        """Pass this rank's batches through the model, with a bar if there is to be ``progress``."""
        model, gradient = self.model, self.gradient
        with self.ranks.agreeing(), ExitStack() as stack:
            advance = None
            if progress and self.ranks.rank == 0:
                done = 0 if self._state is None else self._state.done
                advance = stack.enter_context(token_bar(self._n_expected, done))
            stack.enter_context(as_it_was(model))
            watch = stack.enter_context(
                watching(self.modules, self.sums, gradient=gradient, all_experts=self.all_experts)
            )
            stack.callback(reshard, model)
            if gradient:
                stack.enter_context(passing_gradients(model))
                stack.enter_context(recomputing(model))
            # The forward pass of a sharded model waits for the other ranks: a rank that has no more
            # batches runs empty ones until all are through.
            batches = self._read()
            for each in self.ranks.in_step(batches) if self._sharded else batches:
                batch = each or nothing(self._reader.device)
                run_batch(model, batch, watch, sharded=self._sharded, packed=self._packed)
                if advance is not None:
                    advance(int(batch.attended.sum()))
            self.sums = on_host(self.sums)
            check_finite(self.sums, gradient)

    def _read(self) -> Iterator[Batch]:
        """The batches that are to run. All are tallied, those that an earlier run has done too."""
        state = self._state
        for number, raw in enumerate(self._batches):
            batch = self._reader.read(raw, number)
            self.tally.add(batch)
            if state is not None and state.has(raw):
                continue
            yield batch
            if state is not None:  # asked for the next one: this one is in the sums
                state.add()
        if state is not None:
            state.end()

    def join(self) -> dict[str, Tensor]:
        """Make sums and tally those of all ranks together.

        Returns:
            B's name -> squared norms of B's columns, ``[n_units]``; none for gradient metrics.

        Raises:
            ValueError: the data is not enough for the metric.
        """
        self.tally.join(self.ranks)
        self.tally.check(metric=self.metric, tokens=self.tokens)
        if self.gradient and self.tally.n_targets == 0:
            raise ValueError("loader has no token to predict: the loss is empty")
        join(self.ranks, self.sums, gradient=self.gradient)
        check_ran(self.modules, self.sums)
        with self.ranks.agreeing():
            return all_column_sq_norms({} if self.gradient else self.modules)
