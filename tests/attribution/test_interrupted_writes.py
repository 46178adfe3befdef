"""Runs in memory that meet a full disk or a NaN, and the command that goes on after a kill."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, fails
from interrupted import PART, batches, interrupt
from streamed import assert_same, dying, saved
from tiny_models import build
from torch import Tensor
from transformers import PreTrainedModel

from ssah.attribution import Attribution, attribute, discard, stream
from ssah.storage import load_tensors


def in_child(run: Callable[[], str | None], limit: int) -> str:
    """What ``run`` returns in a child whose files may have ``limit`` bytes: a disk that is full."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os.write(write, (run() or "nothing went wrong").encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        message = told.read()
    assert os.waitpid(child, 0)[1] == 0
    return message


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    interrupt(2, tmp_path / "state")
    attribute(build("llama"), batches(1)).save(tmp_path / "out")
    before = Attribution.load(tmp_path / "out")
    model = build("llama")

    def score() -> str | None:
        try:
            attribute(model, batches(), resume_dir=tmp_path / "state", save_every_seconds=0)
        except OSError as error:
            return str(error)
        return None

    def save() -> str | None:
        try:
            attribute(model, batches()).save(tmp_path / "out")
        except OSError as error:
            return str(error)
        return None

    message = in_child(score, limit=2000)
    assert message.startswith("[Errno 27] File too large: ")
    assert str(tmp_path / "state" / PART) in message
    assert str(tmp_path / "out") in in_child(save, limit=2000)
    assert_same(Attribution.load(tmp_path / "out"), before)
    for folder in (tmp_path / "out", tmp_path / "state" / PART):
        assert len(list(folder.iterdir())) == 2  # nothing is left of what could not be written
    result = attribute(model, batches(), resume_dir=tmp_path / "state")
    assert_same(result, attribute(model, batches()))


def test_a_full_disk_in_a_streamed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, state = saved(tmp_path / "model"), tmp_path / "state"
    for nth in range(1, 7):  # the writes of test_streaming
        count, write = 0, Path.write_bytes

        def full(path: Path, content: bytes, nth: int = nth, write: Any = write) -> int:
            nonlocal count
            count += 1
            if count == nth:
                write(path, content[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, content)

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=f"No space left on device: '{state}/layer-000"):
            stream(folder, batches(2), resume_dir=state)
        monkeypatch.undo()
        result, _ = stream(folder, batches(2), resume_dir=state)
        assert_same(result, stream(folder, batches(2))[0])
        discard(state)


def poisoned(at: int) -> PreTrainedModel:
    """In batch number ``at`` one layer gives a NaN, as a faulty machine may."""
    model, seen = build("llama"), iter(range(9))

    def poison(_: Any, __: Any, out: Tensor) -> Tensor:
        return out * torch.nan if next(seen) == at else out

    model.model.layers[1].post_attention_layernorm.register_forward_hook(poison)
    return model


@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_sums_that_are_not_finite_are_not_kept(save_every: float, tmp_path: Path) -> None:
    options = {"resume_dir": tmp_path, "save_every_seconds": save_every}
    with pytest.raises(FloatingPointError, match=r"enter 'model.layers.1.mlp.down_proj' are NaN"):
        attribute(poisoned(at=1), batches(), **options)
    kept = list(tmp_path.glob("rank-*/tensors-*"))
    assert len(kept) == (save_every == 0)
    for file in kept:
        tensors, meta = load_tensors(file.parent)
        assert meta["reached"]["batches"] == 1
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    result = attribute(build("llama"), batches(), **options)
    assert_same(result, attribute(build("llama"), batches()))


def test_a_weight_that_is_not_finite_is_named_each_time(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"model.layers.1.mlp.down_proj"):
            attribute(model, batches(), resume_dir=tmp_path, save_every_seconds=0)
    assert not list(tmp_path.glob("rank-*/*"))


# ------------------------------------------------------------------------------------ command line


def arguments(model: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("--data", "builtin:utility", "--limit", 12, "--batch-size", 2)
    return ("attribute", model, *data, "--out", out, *more)


def test_the_command_goes_on_says_so_and_cleans_up(tiny_chat_folder: Path, tmp_path: Path) -> None:
    model = tiny_chat_folder
    call(*arguments(model, tmp_path / "whole"))
    expected = Attribution.load(tmp_path / "whole")
    assert not (tmp_path / "whole" / "unfinished").exists()
    command = arguments(model, tmp_path / "out", "--save-every", 0)
    assert dying(5, lambda: call(*command))
    other = arguments(model, tmp_path / "out", "--metric", "norm")
    assert "unfinished run with metric 'variance', not 'norm'" in fails(*other)
    other = arguments(model, tmp_path / "out", "--limit", 11)
    assert "unfinished run with data" in fails(*other)
    other = arguments(model, tmp_path / "out", "--batch-size", 3)
    assert "does not begin with the 2 batches" in fails(*other)
    result = call(*command)
    assert "scoring units: 2 of 6 are done, going on after them" in result.stderr
    assert_same(Attribution.load(tmp_path / "out"), expected)
    assert not (tmp_path / "out" / "unfinished").exists()
    assert "are done" not in call(*command).stderr


def test_the_streamed_command_says_where_it_goes_on(tiny_chat_folder: Path, tmp_path: Path) -> None:
    command = arguments(tiny_chat_folder, tmp_path / "out", "--stream")
    assert dying(9, lambda: call(*command))  # six hidden states, two files of the first layer
    assert "scoring layers: 1 of 2 are done" in call(*command).stderr
    assert "leave --stream out" in fails(*command, "--save-every", 1)


def test_a_full_disk_is_one_line(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_chat_folder, tmp_path / "out"
    call(*arguments(model, out))
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    for more in (("--save-every", 0), (), ("--stream",)):  # the state, the result, hidden states
        line = fails(*arguments(model, out, *more))
        assert f"No space left on device: '{out}/" in line
    assert {file.name: file.read_bytes() for file in out.glob("*.*")} == before
