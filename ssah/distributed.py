"""Scoring by several processes: agreeing on what is scored, and joining what each one saw.

Every rank runs its own batches; nothing is sent meanwhile. At the end the states (count, mean, M2,
gradient sums) of all ranks are gathered, and every rank merges them in the order of the ranks, in
float64, so that all of them hold the same bits. An error on one rank is told to the others.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssah.moved import renamed
from ssah_kernels.sharded import is_sharded

__all__ = [
    "Dealt",
    "Group",
    "RankLostError",
    "Ranks",
    "check_not_sharded",
    "deal",
    "launched",
    "reshard",
]

Group: TypeAlias = "dist.ProcessGroup | str | None"
Item = TypeVar("Item")

# What an error of another rank is raised as: the first of these that it is an instance of.
_ERRORS = (TypeError, ValueError, OSError, FloatingPointError, ImportError, RuntimeError)


class RankLostError(RuntimeError):
    """Another rank does not answer."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that work on one result; by default this one alone.

    Attributes:
        rank: of this process among them.
        size: their number.
        group: their process group, None for one process.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    @renamed(group="process_group")
    def of(cls, process_group: Group = "auto") -> Ranks:
        """The ranks of ``process_group``.

        Args:
            process_group: a process group of ``torch.distributed``; ``"auto"``: the default one if
                it is initialised, else this process alone; None: this process alone.

        Raises:
            TypeError: ``process_group`` is something else.
            ValueError: ``process_group`` is another string, or this process is not in it.
        """
        if isinstance(process_group, str):
            if process_group != "auto":
                raise ValueError(
                    f"process_group is {process_group!r}, must be 'auto', None or a process group"
                )
            initialised = dist.is_available() and dist.is_initialized()
            process_group = dist.group.WORLD if initialised else None
        if process_group is None:
            return cls()
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group is {process_group!r}, must be 'auto', None or a process group that "
                "this process is a member of"
            )
        return cls(dist.get_rank(process_group), dist.get_world_size(process_group), process_group)

    @classmethod
    def over(cls, model: nn.Module) -> Ranks | None:
        """The ranks that ``model`` is sharded over (``fully_shard``), or None: it is not."""
        reshard(model)
        for parameter in model.parameters():
            if is_sharded(parameter):
                mesh = parameter.device_mesh
                # A mesh of several dimensions (shards, and copies of them) has no one group.
                return cls.of(mesh.get_group() if mesh.ndim == 1 else "auto")
        return None

    def gather(self, tensor: Tensor) -> Tensor:
        """``tensor`` of every rank, ``[ranks, ...]`` in their order, on the device of ``tensor``.

        Raises:
            RankLostError: a rank has died, or does not answer within the group's timeout.
        """
        if self.size == 1:
            return tensor[None]
        # NCCL serves GPUs alone, Gloo the CPU: what is on another device goes by way of one served.
        served = [entry.split(":")[0] for entry in dist.get_backend_config(self.group).split(",")]
        device = tensor.device if tensor.device.type in served else torch.device(served[0])
        own = tensor.to(device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        try:
            dist.all_gather(parts, own, group=self.group)
        except RuntimeError as error:
            raise RankLostError(
                f"rank {self.rank} of {self.size} waited for the others in vain: one has died, or "
                f"does not answer within the group's timeout ({str(error).splitlines()[0]})"
            ) from error
        return torch.stack(parts).to(tensor.device)

    def tell(self, value: Any) -> list[Any]:
        """``value`` (JSON types) of every rank, in their order."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        # all_gather wants tensors of one size.
        sizes = self.gather(torch.tensor(len(text))).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = self.gather(padded)
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, sizes, strict=True)]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """An error inside the block on one rank becomes an error on every rank, at its end.

        Raises:
            Exception: the other rank's, as the nearest of Python's own kinds, with its number.
            RankLostError: a collective failed because another rank is gone.
        """
        try:
            yield
        except Exception as error:
            kind = next((i for i, each in enumerate(_ERRORS) if isinstance(error, each)), -1)
            message = f"{error}" if kind >= 0 else f"{type(error).__name__}: {error}"
            try:
                self.tell([kind, message])
            except RankLostError as lost:  # who cannot be told any more
                # The model's own collectives fail without saying what it means.
                if isinstance(error, RuntimeError) and not isinstance(error, RankLostError):
                    raise RankLostError(f"{lost}; before that: {error}") from error
            raise
        # No error here: None for that, while another rank may tell of one.
        for rank, told in enumerate(self.tell(None)):
            if told is not None:
                kind, message = told
                raise _ERRORS[kind](f"rank {rank}: {message}")

    def first(self, compute: Callable[[], Item]) -> Item:
        """What ``compute`` gives on the first rank (JSON types), on every rank.

        Raises:
            Exception: what ``compute`` raises, on every rank.
        """
        value: Any = None
        with self.agreeing():
            if self.rank == 0:
                value = compute()
        told: Item = self.tell(value)[0]
        return told

    def common(self, **facts: Any) -> dict[str, Any]:
        """The facts (JSON types), which must be the same on every rank that has them (not None).

        Raises:
            ValueError: two ranks differ; on every rank.
        """
        told = self.tell(facts)
        result: dict[str, Any] = {}
        for name in facts:
            known = [(rank, each[name]) for rank, each in enumerate(told) if each[name] is not None]
            for rank, value in known:
                if value != known[0][1]:
                    raise ValueError(
                        f"{name} is {value!r} on rank {rank} and {known[0][1]!r} on rank "
                        f"{known[0][0]}, must be the same on every rank"
                    )
            result[name] = known[0][1] if known else None
        return result

    def check_dealt(self, same: bool) -> None:
        """Refuse batches that every rank was given, so that each would count that often.

        Args:
            same: whether all ranks made the same of their batches, and not nothing.

        Raises:
            ValueError: they did.
        """
        if self.size > 1 and same:
            raise ValueError(
                f"loader yields the same batches on all {self.size} ranks, so that every token "
                "would count that often: give each rank its own, e.g. ssah.distributed.deal(loader)"
            )

    def in_step(self, items: Iterable[Item]) -> Iterator[Item | None]:
        """As many items on every rank: None on a rank that has no more while another has.

        For models whose forward pass itself waits for the other ranks. An error of ``items`` on one
        rank is raised on every rank, before any of them goes on.
        """
        iterator = iter(items)
        while True:
            with self.agreeing():
                item = next(iterator, None)
            if not any(self.tell(item is not None)):
                return
            yield item


class Dealt:
    """Every n-th batch of a loader that all ranks hold alike; made by :func:`deal`."""

    def __init__(self, loader: Iterable[Any], ranks: Ranks) -> None:
        self.loader, self.ranks = loader, ranks

    def __iter__(self) -> Iterator[Any]:
        # Rank 1 of 3 has batches 1, 4, 7, ...
        return islice(iter(self.loader), self.ranks.rank, None, self.ranks.size)

    def __length_hint__(self) -> int:
        return len(range(self.ranks.rank, operator.length_hint(self.loader, 0), self.ranks.size))

    @property
    def fingerprint(self) -> str | None:
        """That of the whole loader, if it has one: all ranks together see all of it."""
        return getattr(self.loader, "fingerprint", None)


@renamed(group="process_group")
def deal(loader: Iterable[Any], process_group: Group = "auto") -> Dealt:
    """This rank's share of the batches of ``loader``, dealt whole, one at a time.

    No batch is repeated to make shares even, as ``DistributedSampler`` and accelerate's
    ``even_batches`` do: some ranks get one more, or none.

    Args:
        loader: the same on every rank.
        process_group: as in :func:`ssah.attribute`.
    """
    return Dealt(loader, Ranks.of(process_group))


def check_not_sharded(model: nn.Module) -> None:
    """Refuse a model that ``fully_shard`` has sharded, for what runs its parts by themselves.

    Raises:
        ValueError: it is.
    """
    if Ranks.over(model) is not None:
        raise ValueError(
            f"model {type(model).__name__} is sharded (fully_shard), and its parts are to run by "
            "themselves: it must be whole on every rank, which then has batches of its own"
        )


def reshard(model: nn.Module) -> None:
    """Let go of the weights that ``fully_shard`` gathered: the outermost module keeps its own after
    a forward pass without a backward one. Does nothing to a model that is not sharded."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` or ``accelerate launch`` started, inside the block.

    Their process group is initialised, unless it is already, and destroyed at the end. With an
    accelerator, each takes the one of its number on this machine. Without a launcher: this process.
    """
    launches = int(os.environ.get("WORLD_SIZE") or "1") > 1 and "MASTER_ADDR" in os.environ
    if not launches or dist.is_initialized():
        yield Ranks.of()
        return
    # Before the group is made, since NCCL takes the device that is current then.
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group()
    try:
        yield Ranks.of()
    finally:
        dist.destroy_process_group()
