"""What a run in memory knows between two batches, in a folder from which the same call goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ssah.attribution import partial_runs
from ssah.attribution.sums import Sums, check_finite, on_host
from ssah.attribution.tally import BatchHash
from ssah.compat.transformers import attention_implementation
from ssah.distributed import Ranks
from ssah.models import weights_hash
from ssah.storage import META, check_fields, one_run
from ssah.units import config_hash
from ssah.version import __version__


def run_identity(
    model: PreTrainedModel, device: torch.device, weights: str | None, **choices: Any
) -> dict[str, Any]:
    """Everything that changes the sums of a run, but for its batches.

    Args:
        model: the model.
        device: where it computes.
        weights: the hash of its weights, computed here if it is not known.
        choices: what was asked for, and the fingerprint of the data: plain data.
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "model": config_hash(model),
        "weights": weights or weights_hash(model),
        "attention": attention_implementation(model),
        "dtype": str(model.dtype),
        "device": device.type,
        **choices,
    }


class BatchState:
    """The sums over the first batches of a rank's loader, written now and then.

    Sums that are NaN or infinite are never written: a run that meets them goes on before them.

    Args:
        folder: of the whole run; each rank has a folder in it, made if need be.
        identity: plain data, everything that changes the result but for the batches.
        sums: B's name -> sums; those of the batches that are done are put in their place, and
            they are what is written.
        gradient: whether they have sums of gradients.
        every: seconds at least between two writes, which come after a batch.

    Attributes:
        done: number of batches that the sums are of.

    Raises:
        ValueError: the folder is of another run, was damaged, or a run is under way in it.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        sums: Mapping[str, Sums],
        *,
        ranks: Ranks,
        gradient: bool,
        every: float,
    ) -> None:
        self.folder, self.identity, self.sums = folder, dict(identity), sums
        self.gradient, self.every = gradient, every
        self.done = self._seen = 0
        self._hash, self._expected = BatchHash(), ""
        with ExitStack() as stack:
            if ranks.rank == 0:  # the other ranks are of the same run
                stack.enter_context(one_run(folder))
            self._load(ranks)
            self._lock = stack.pop_all()  # kept only where nothing was refused

    def _load(self, ranks: Ranks) -> None:
        """Take over what the folder has."""
        folder = self.folder
        # Of another number of ranks each has run other batches. Their number is in the name, so
        # that ranks which had written nothing yet see it too.
        for other in folder.glob(f"rank-*-of-*/{META}"):
            n_ranks = int(other.parent.name.rpartition("-")[2])
            partial_runs.refuse_other(folder, "ranks", n_ranks, ranks.size)
        self.part = folder / f"rank-{ranks.rank:04d}-of-{ranks.size:04d}"
        found = partial_runs.load(self.part, self.identity)
        if found is not None:
            before, _, reached = found
            check_fields(self.part / META, reached, {"batches": int, "trail": str})
            if before.keys() != self.sums.keys():
                raise partial_runs.damaged(folder, f"{str(self.part)!r} has sums of other modules")
            self.done, self._expected = reached["batches"], reached["trail"]
            for name, own in self.sums.items():
                for field in fields(Sums):  # in place: modules are watched with these tensors
                    getattr(own, field.name).copy_(getattr(before[name], field.name))
        self.part.mkdir(parents=True, exist_ok=True)
        self._written = time.monotonic()  # a clock that nobody sets

    def close(self) -> None:
        """Another run may use the folder now."""
        self._lock.close()

    def has(self, batch: Mapping[str, Any]) -> bool:
        """Whether the sums have the loader's next batch already.

        Raises:
            ValueError: the batches that they have are others than those of this loader.
        """
        self._hash.update(batch)
        self._seen += 1
        # Compared once, at the last batch that was done: the hash is of all up to there.
        if self._seen == self.done and self._hash.hexdigest() != self._expected:
            raise ValueError(
                f"loader does not begin with the {self.done} batches that the unfinished run in "
                f"{str(self.folder)!r} has done, it must yield the same ones in the same order: "
                "take another folder, or remove this one"
            )
        return self._seen <= self.done

    def add(self) -> None:
        """The batch that :meth:`has` was last asked about is in the sums; write, if it is time.

        Raises:
            FloatingPointError: a sum is not finite; the module is named.
            OSError: the disk is full, or the like; what was written before is still there.
        """
        self.done += 1
        if time.monotonic() - self._written < self.every:
            return
        sums = on_host(self.sums)
        check_finite(sums, self.gradient)
        partial_runs.keep(
            self.part, self.identity, sums, batches=self.done, trail=self._hash.hexdigest()
        )
        self._written = time.monotonic()

    def end(self) -> None:
        """The loader has no more.

        Raises:
            ValueError: it had fewer than the sums are of.
        """
        if self._seen < self.done:
            raise ValueError(
                f"loader yielded {self._seen} batches, the unfinished run in {str(self.folder)!r} "
                f"has done {self.done}: take another folder, or remove this one"
            )
