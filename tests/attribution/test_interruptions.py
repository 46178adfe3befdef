"""Runs in memory that were interrupted: killed, out of disk, with damaged files or other data."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import call, fails
from streamed import assert_same, dying, saved, spoil
from tiny_models import build, collate, rows
from torch import Tensor
from transformers import PreTrainedModel

from ssah.attribution import METRICS, Attribution, attribute, discard, stream
from ssah.attribution import run as attribution
from ssah.models import weights_hash
from ssah.storage import load_tensors, save_tensors

Batches = list[dict[str, Tensor]]
PART = "rank-0000-of-0001"


def batches(n: int = 3) -> Batches:
    return [collate(rows((11, 4, 9), seed=seed)) for seed in range(n)]


def killed_after(n: int, data: Batches) -> Iterator[dict[str, Tensor]]:
    """The first ``n`` batches, then an error, which leaves what a kill leaves between batches."""
    yield from data[:n]
    raise InterruptedError


def interrupt(n: int, state: Path) -> None:
    """Leave a state of ``n`` batches of the tiny model."""
    loader = killed_after(n, batches())
    with pytest.raises(InterruptedError):
        attribute(build("llama"), loader, resume_dir=state, save_every_seconds=0)


# ------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("metric", METRICS)
def test_killed_at_any_write_it_goes_on_to_the_same_bits(metric: str, tmp_path: Path) -> None:
    expected = attribute(build("llama"), batches(), metric=metric)

    def run(state: Path) -> Attribution:
        return attribute(
            build("llama"), batches(), metric=metric, resume_dir=state, save_every_seconds=0
        )

    nth, killed = 1, True
    while killed:
        state = tmp_path / f"state-{nth}"
        killed = dying(nth, lambda state=state: run(state))
        assert_same(run(state), expected)
        nth += 1
    assert nth - 2 == 6  # sums and meta of three batches


def test_batches_that_are_done_do_not_run_again(tmp_path: Path) -> None:
    interrupt(2, tmp_path / "state")
    model, ran = build("llama"), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append("a batch"))
    result = attribute(model, batches(), resume_dir=tmp_path / "state", save_every_seconds=0)
    assert len(ran) == 1
    assert_same(result, attribute(build("llama"), batches()))
    assert_same(attribute(model, batches(), resume_dir=tmp_path / "state"), result)  # none is left
    assert len(ran) == 1


def test_experts_and_the_callers_mode(tmp_path: Path) -> None:
    options = {"resume_dir": tmp_path / "state", "save_every_seconds": 0, "all_experts": True}
    expected = attribute(build("olmoe"), batches(), all_experts=True)
    with torch.inference_mode():
        with pytest.raises(InterruptedError):
            attribute(build("olmoe"), killed_after(2, batches()), **options)
        assert_same(attribute(build("olmoe"), batches(), **options), expected)


def test_it_writes_when_it_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("ssah.attribution.resuming.time", clock)
    written: list[int] = []
    keep = attribution.BatchState.add

    def add(self: Any) -> None:
        nonlocal now
        now += 10.0  # a batch takes
        before = self._written
        keep(self)
        if self._written != before:
            written.append(self.done)

    monkeypatch.setattr(attribution.BatchState, "add", add)
    attribute(build("llama"), batches(7), resume_dir=tmp_path / "state", save_every_seconds=25)
    assert written == [3, 6]


def test_without_a_state_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attribution, "BatchState", None)
    for metric in METRICS:
        attribute(build("llama"), batches(), metric=metric, save_every_seconds=0)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ another run


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """One column of one weight is another."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 7] *= 0.5
    return model


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("metric 'variance', not 'norm'", {"metric": "norm"}),
        (r"modules \['attention', 'mlp'\], not \['mlp'\]", {"modules": "mlp"}),
        ("tokens 'labels', not 'all'", {"tokens": "all"}),
        ("dtype 'torch.float32', not 'torch.bfloat16'", {"dtype": torch.bfloat16}),
        ("weights", {"change": halved}),
        ("model", {"name": "llama_bias"}),
        ("attention 'sdpa', not 'eager'", {"implementation": "eager"}),
        ("torch", {"torch": "2.0"}),
        ("version", {"version": "0.0"}),
    ],
)
def test_the_state_of_another_run_is_refused(
    field: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(2, tmp_path / "state")
    if "torch" in options:
        monkeypatch.setattr("ssah.attribution.run.torch.__version__", options.pop("torch"))
    if "version" in options:
        monkeypatch.setattr(attribution, "__version__", options.pop("version"))
    made = {"dtype": options.pop("dtype", torch.float32)}
    model = options.pop("change", lambda same: same)(build(options.pop("name", "llama"), **made))
    model.set_attn_implementation(options.pop("implementation", "sdpa"))
    message = f"'{tmp_path / 'state'}' has an unfinished run with {field}.*take another folder"
    with pytest.raises(ValueError, match=message):
        attribute(model, batches(), resume_dir=tmp_path / "state", **options)
    monkeypatch.undo()
    interrupt(3, tmp_path / "state")  # the state is what it was


def test_all_experts_is_part_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        attribute(
            build("olmoe"), killed_after(1, batches()), resume_dir=tmp_path, save_every_seconds=0
        )
    with pytest.raises(ValueError, match="run with all_experts False, not True"):
        attribute(build("olmoe"), batches(), all_experts=True, resume_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [data[1], data[0], data[2]], "does not begin with the 2 batches"),
        (lambda data: [collate(rows((11, 4))), *data[1:]], "does not begin with the 2 batches"),
        (lambda data: [{**data[0], "position_ids": torch.arange(11)[None]}, *data[1:]], "begin"),
        (lambda data: data[:1], "yielded 1 batches, .* has done 2"),
        (lambda data: iter(()), "yielded 0 batches, .* has done 2"),
    ],
)
def test_a_loader_with_other_batches_is_refused(
    change: Callable[[Batches], Any], message: str, tmp_path: Path
) -> None:
    interrupt(2, tmp_path / "state")
    options = {"resume_dir": tmp_path / "state", "tokens": "labels"}
    with pytest.raises(ValueError, match=message):
        attribute(build("llama"), change(batches()), **options)
    result = attribute(build("llama"), batches(), **options)
    assert_same(result, attribute(build("llama"), batches()))


class Fingerprinted(list[dict[str, Tensor]]):
    fingerprint: str | None = "one"


def test_data_that_a_loader_knows_by_a_fingerprint(tmp_path: Path) -> None:
    class Ending(Fingerprinted):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return killed_after(2, batches())

    with pytest.raises(InterruptedError):
        attribute(build("llama"), Ending(), resume_dir=tmp_path / "state", save_every_seconds=0)
    other = Fingerprinted(batches())
    other.fingerprint = "two"  # what is left of the data may be other than it was
    with pytest.raises(ValueError, match="run with data 'one', not 'two'"):
        attribute(build("llama"), other, resume_dir=tmp_path / "state")
    with pytest.raises(ValueError, match="does not begin with"):
        attribute(build("llama"), Fingerprinted(batches()[::-1]), resume_dir=tmp_path / "state")
    result = attribute(build("llama"), Fingerprinted(batches()), resume_dir=tmp_path / "state")
    assert_same(result, attribute(build("llama"), Fingerprinted(batches())))


def test_the_hash_of_weights_sees_each_of_them(tmp_path: Path) -> None:
    seen = {weights_hash(build("llama_bias"))}
    assert weights_hash(build("llama_bias")) in seen
    for name, _ in build("llama_bias").named_parameters():
        model = build("llama_bias")
        model.get_parameter(name).data.flatten()[-1] += 1
        seen.add(weights_hash(model))
    model = build("llama_bias")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data[[0, 1]] = weight.data[[1, 0]].clone()
    seen.add(weights_hash(model))
    assert len(seen) == 2 + len(list(model.parameters()))


def test_save_every_that_means_nothing_is_refused() -> None:
    for wrong in (-1.0, float("nan")):
        with pytest.raises(
            ValueError, match=f"save_every_seconds is {wrong}, must be 0 or more seconds"
        ):
            attribute(build("llama"), batches(), save_every_seconds=wrong)


# ----------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("what", ["tensors-*", "meta.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_damaged_state_is_named(what: str, cut: bool, tmp_path: Path) -> None:
    interrupt(2, tmp_path)
    (path,) = (tmp_path / PART).glob(what)
    spoil(path, cut=cut)
    with pytest.raises(ValueError, match=rf"{path}' is damaged.*remove '{tmp_path}'"):
        attribute(build("llama"), batches(), resume_dir=tmp_path)


def test_an_edited_result_is_named(tmp_path: Path) -> None:
    attribute(build("llama"), batches()).save(tmp_path)
    meta = tmp_path / "meta.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({**content, "metric": "norm"}))
    with pytest.raises(ValueError, match=f"'{meta}' is damaged: it is not as it was written"):
        Attribution.load(tmp_path)
    meta.write_text("[]")
    with pytest.raises(ValueError, match=f"'{meta}' is damaged: it holds a list, not an object"):
        Attribution.load(tmp_path)


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"x": torch.ones(3)}, {})
    assert dying(1, lambda: save_tensors(tmp_path, {"x": torch.zeros(3)}, {}))
    assert list(tmp_path.glob(".*"))
    assert torch.equal(load_tensors(tmp_path)[0]["x"], torch.ones(3))
    save_tensors(tmp_path, {"x": torch.zeros(3)}, {})
    assert not list(tmp_path.glob(".*"))


def test_a_run_whose_removal_was_killed_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(2, tmp_path / "state")
    monkeypatch.setattr("ssah.attribution.partial_runs.shutil.rmtree", None)  # killed before it
    with pytest.raises(TypeError):
        discard(tmp_path / "state")
    monkeypatch.undo()
    assert not (tmp_path / "state").exists()
    interrupt(1, tmp_path / "state")
    discard(tmp_path / "state")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- full disk, not finite


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
