"""Several processes that are interrupted: each goes on from its own part, none waits forever."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from ranks import PATIENCE, batches, expect, same_bits, sharded, start
from streamed import assert_same
from torch import Tensor

from ssah.attribution import Attribution, attribute
from ssah.distributed import deal
from ssah.storage import load_tensors

MODELS: dict[str, Callable[[int], Any]] = {
    "whole": lambda n: tiny_models.build("llama_bias"),
    "sharded": sharded,
}
OTHERS = "waited for the others in vain: one has died, or does not answer"


def undisturbed(rank: int, n: int, folder: Path, kind: str, metric: str) -> None:
    attribute(MODELS[kind](n), deal(batches()), metric=metric).save(folder / f"result-{rank}")


def die(rank: int, n: int, folder: Path, kind: str, metric: str) -> None:
    """Rank 1 is killed in the middle of its third batch."""
    model, batch = MODELS[kind](n), iter(range(9))

    def kill(*_: Any) -> None:
        if rank == 1 and next(batch) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.layers[1].register_forward_pre_hook(kill)
    state = {"resume_dir": folder.parent / "state", "save_every_seconds": 0}
    with pytest.raises(RuntimeError, match=f"rank {rank} of {n} {OTHERS}"):
        attribute(model, deal(batches()), metric=metric, **state)
    os._exit(0)


def go_on(rank: int, n: int, folder: Path, kind: str, metric: str) -> None:
    model, ran = MODELS[kind](n), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append("a batch"))
    state = {"resume_dir": folder.parent / "state", "save_every_seconds": 0}
    result = attribute(model, deal(batches()), metric=metric, **state)
    assert same_bits(result)
    assert len(ran) <= 2
    result.save(folder / f"result-{rank}")


def refuse(rank: int, n: int, folder: Path) -> None:
    state = folder.parent / "state"
    expect(ValueError, f"run with ranks 2, not {n}", rank, None, resume_dir=state)


def kept(state: Path) -> list[int]:
    parts = sorted(part for part in state.iterdir() if (part / "meta.json").is_file())
    return [load_tensors(part)[1]["reached"]["batches"] for part in parts]


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("whole", "taylor"),
        ("sharded", "variance"),
        pytest.param("whole", "variance", marks=pytest.mark.exhaustive),
        pytest.param("sharded", "taylor", marks=pytest.mark.exhaustive),
    ],
)
def test_each_rank_goes_on_from_its_own_part(kind: str, metric: str, tmp_path: Path) -> None:
    how = {"kind": kind, "metric": metric}
    start(with_(undisturbed, **how), 2, tmp_path / "undisturbed")
    context = start(with_(die, **how), 2, tmp_path / "die", join=False)
    for process in context.processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL]
    # In step a rank is at most a batch ahead; otherwise rank 0 has done all of its own.
    first, second = kept(tmp_path / "state")
    assert first in ((2, 3) if kind == "sharded" else (4,))
    assert second == 2
    start(refuse, 3, tmp_path / "three")
    with pytest.raises(ValueError, match="run with ranks 2, not 1"):
        attribute(tiny_models.build("llama_bias"), batches(), resume_dir=tmp_path / "state")
    start(with_(go_on, **how), 2, tmp_path / "again")
    for rank in range(2):
        result = Attribution.load(tmp_path / "again" / f"result-{rank}")
        expected = Attribution.load(tmp_path / "undisturbed" / f"result-{rank}")
        assert_same(result, expected)


def with_(worker: Callable[..., None], **options: Any) -> Callable[[int, int, Path], None]:
    return lambda rank, n, folder: worker(rank, n, folder, **options)


def fail(rank: int, n: int, folder: Path) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for kind, build in MODELS.items():
        state = folder / kind
        options = {"resume_dir": state, "save_every_seconds": 0}
        if rank == 1:
            Path.write_bytes = full  # type: ignore[assignment, method-assign]
        where = rf"No space left on device: '{state}/rank-0001-of-0002"
        expect(OSError, where, rank, 1, model=build(n), **options)
        Path.write_bytes = write  # type: ignore[method-assign]
        dist.barrier()
        model = build(n)
        if rank == 1:  # in a layer of one rank, after two batches
            poison(model, after=2)
        where = r"enter .*1.mlp.down_proj. are NaN"
        expect(FloatingPointError, where, rank, 1, model=model, **options)
        dist.barrier()
        if rank == 1:
            assert kept(state)[1] == 2
            file = next((state / "rank-0001-of-0002").glob("tensors-*"))
            file.write_bytes(file.read_bytes()[:-1])
        dist.barrier()
        where = r"rank-0001-of-0002/tensors.* is damaged"
        expect(ValueError, where, rank, 1, model=build(n), **options)
    state = folder / "one" if rank == 1 else None
    expect(
        ValueError, "resume_dir is True on rank 1 and False on rank 0", rank, None, resume_dir=state
    )
    assert same_bits(attribute(tiny_models.build("llama"), deal(batches())))  # still in step


def poison(model: Any, after: int) -> None:
    seen = iter(range(99))

    def hook(_: Any, __: Any, out: Tensor) -> Tensor:
        return out * torch.nan if next(seen) >= after else out

    model.model.layers[1].post_attention_layernorm.register_forward_hook(hook)


def test_what_goes_wrong_on_one_rank_is_said_on_every_rank(tmp_path: Path) -> None:
    start(fail, 2, tmp_path)


def stop(rank: int, n: int, folder: Path) -> None:
    group = dist.new_group(timeout=timedelta(seconds=3))

    def loader() -> Any:
        yield batches()[rank]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=f"rank {rank} of {n} {OTHERS}"):
        attribute(tiny_models.build("llama"), loader(), process_group=group)
    assert time.monotonic() - begun < PATIENCE  # by default it would be 30 minutes
    os._exit(0)


def test_a_rank_that_hangs_is_waited_for_until_the_timeout(tmp_path: Path) -> None:
    context = start(stop, 3, tmp_path, join=False)
    for rank in (0, 2):
        context.processes[rank].join(PATIENCE)
    context.processes[1].kill()
    context.processes[1].join(PATIENCE)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL, 0]
