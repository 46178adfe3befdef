"""Runs in memory that were interrupted: killed, out of disk, with damaged files or other data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interrupted import PART, Batches, batches, interrupt, killed_after
from streamed import assert_same, dying, spoil
from tiny_models import build, collate, rows
from torch import Tensor
from transformers import PreTrainedModel

from ssah.attribution import METRICS, Attribution, attribute, discard
from ssah.attribution import run as attribution
from ssah.models import weights_hash
from ssah.storage import load_tensors, save_tensors

# ------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize(
    "metric",
    [
        pytest.param(each, marks=[] if each in ("variance", "taylor") else pytest.mark.exhaustive)
        for each in METRICS
    ],
)
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
        monkeypatch.setattr("ssah.attribution.resuming.__version__", options.pop("version"))
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
