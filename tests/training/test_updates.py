"""Saving what a plan trained and merging it: exact, and into nothing but its base."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_hub
import huggingface_hub
import pytest
import tiny_models
import torch
from plans import assert_equal, draw, loss_of, make, snapshot
from safetensors.torch import load, load_file
from transformers import PreTrainedModel

from ssah.evaluation import rate
from ssah.models import digest
from ssah.storage import results
from ssah.training import UpdatePlan, freeze, load_update, train_only
from ssah.training.splitting import complement_rows
from ssah.training.updates import saving


def trained(model: PreTrainedModel, mode: str = "train_only") -> UpdatePlan:
    """A plan that has made two steps."""
    plan = make(model, mode)
    optimizer = plan.optimizer(lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return plan


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("freeze", torch.bfloat16),
        ("train_only", torch.float32),
        pytest.param("freeze", torch.float32, marks=pytest.mark.exhaustive),
        pytest.param("train_only", torch.bfloat16, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("family", tiny_models.cases(*tiny_models.FAMILIES))
def test_merges_exactly(family: str, mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, base = (tiny_models.build(family, dtype=dtype) for _ in range(2))
    plan = trained(model, mode)
    plan.save_pretrained(tmp_path)
    wanted = snapshot(model)
    load_update(base, tmp_path)
    assert_equal(snapshot(base), wanted)
    (file,) = tmp_path.glob("*.safetensors")
    values = sum(v.numel() for k, v in load_file(file).items() if k.startswith("values/"))
    assert values == sum(p.numel() for p in plan.parameters())


def test_a_large_update_is_made_and_written_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, again = (tiny_models.build("llama") for _ in range(3))
    plan = trained(model)
    shard = 8000
    monkeypatch.setattr(results, "SHARD_BYTES", shard)
    made: list[weakref.ref[torch.Tensor]] = []
    most = []
    write = results.write_whole

    def watched(path: Path, content: bytes) -> None:
        if path.suffix == ".safetensors":
            tensors = load(content)
            alive = sum(each.nbytes for ref in made if (each := ref()) is not None)
            most.append((alive, sum(t.nbytes for t in tensors.values()) - alive))
        write(path, content)

    def noted(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in pieces(*args):
            made.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    pieces = saving._tensors
    monkeypatch.setattr(saving, "_tensors", noted)
    monkeypatch.setattr(results, "write_whole", watched)
    plan.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == len(most) > 2
    # While a file is written, the tensors of this file are there, and none of another.
    assert all(other == 0 for _, other in most)
    largest = max(p.nbytes for p in plan.parameters())
    assert max(alive for alive, _ in most) < shard + largest
    load_update(base, tmp_path)
    assert_equal(snapshot(base), snapshot(model))
    plan.model.load_state_dict(snapshot(tiny_models.build("llama", seed=1)))

    def full(path: Path, content: bytes) -> None:
        if len(most) == 5:
            raise OSError("the disk is full")
        watched(path, content)

    monkeypatch.setattr(results, "write_whole", full)
    with pytest.raises(OSError, match="the disk is full"):
        plan.save_pretrained(tmp_path)  # after two files of other values
    assert sorted(tmp_path.glob("*.safetensors")) == files
    plan.model.load_state_dict(snapshot(base))
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"{files[1].name}.* is damaged"):
        load_update(again, tmp_path)
    monkeypatch.undo()
    plan.save_pretrained(tmp_path)  # one file, in the place of several
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    load_update(again, tmp_path)
    assert_equal(snapshot(again), snapshot(model))


def test_refuses_what_it_does_not_belong_to(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    other = tiny_models.build("llama", seed=1)
    half = tiny_models.build("llama").bfloat16()
    larger = tiny_models.build("llama_bias")
    plan = trained(model)
    plan.save_pretrained(tmp_path)
    for wrong, message in (
        (other, r"trained from other weights .* frozen weights differ"),
        (half, "bfloat16|float32"),
        (larger, "says nothing of .* parameters"),
        (model, "close it first"),
    ):
        before = snapshot(wrong)
        with pytest.raises(ValueError, match=message):
            load_update(wrong, tmp_path)
        assert_equal(snapshot(wrong), before)
    with pytest.raises(FileNotFoundError, match=r"there is no folder"):
        load_update(other, tmp_path / "nothing" / "here")
    flipped = tiny_models.build("llama")
    flipped.model.norm.weight.data.view(torch.int32)[0] ^= 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_update(flipped, tmp_path)


def test_refuses_a_folder_with_something_else(tmp_path: Path) -> None:
    from ssah.storage import save_tensors

    save_tensors(tmp_path, {"a": torch.zeros(1)}, {"content": "attribution"})
    with pytest.raises(ValueError, match="it must hold 'update'"):
        load_update(tiny_models.build("llama"), tmp_path)


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped after three steps and resumed in a new model: as if it had never stopped."""

    def run(plan: UpdatePlan, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(plan.model, step).backward()
            optimizer.step()

    options: dict[str, Any] = {"rounding": "stochastic", "seed": 3, "track_importance": True}
    model = tiny_models.build("qwen2", dtype=torch.bfloat16)
    plan = make(model, "freeze")
    optimizer = plan.optimizer(lr=1e-2, **options)
    run(plan, optimizer, range(3))
    plan.save_pretrained(tmp_path / "update")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    run(plan, optimizer, range(3, 6))

    resumed = tiny_models.build("qwen2", dtype=torch.bfloat16)
    load_update(resumed, tmp_path / "update")
    again = make(resumed, "freeze", plan.units)
    second = again.optimizer(lr=1e-2, **options)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    run(again, second, range(3, 6))
    assert_equal(snapshot(resumed), snapshot(model))
    for name, signed in plan.importance().signed.items():
        assert torch.equal(signed, again.importance().signed[name])


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_hub.use_folder(monkeypatch, tmp_path)
    model, base = (tiny_models.build("llama") for _ in range(2))
    model.config.name_or_path = "/home/someone/secret-project"
    plan = trained(model)
    figures = {"attack success": rate([1, 0, 0, 0])}
    options = {"figures": figures, "data": {"answers": "c0ffee"}, "private": True, "token": "t"}
    assert plan.push_to_hub("me/update", **options) == "https://example.test/me/update"
    card = (tmp_path / "README.md").read_text()
    assert "/home" not in card
    assert 'base_model: "secret-project"\n' in card
    assert "| attack success | 0.25 | 0.04559 to 0.6994 | 4 |" in card
    assert "| fingerprint of answers | `c0ffee` |" in card
    n = sum(parameter.numel() for parameter in plan.parameters())
    assert f"| trained | `{n:,} weights of " in card
    assert calls == {"token": "t", "create": ("me/update", {"private": True, "exist_ok": True})}
    assert "/home" not in (tmp_path / "meta.json").read_text()
    assert json.loads((tmp_path / "meta.json").read_text())["base_model"] == "secret-project"
    load_update(base, "hf:me/update")
    assert_equal(snapshot(base), snapshot(model))
    plan.close()
    with pytest.raises(RuntimeError, match="plan is closed"):
        plan.save_pretrained(tmp_path)


def test_fingerprint_is_of_what_trains() -> None:
    model = tiny_models.build("llama")
    units = draw(model)
    prints = []
    for make_plan in (
        lambda: train_only(model, units),
        lambda: freeze(model, units),
        lambda: train_only(model, units, extra_parameters=("model.norm.weight",)),
        lambda: train_only(model, draw(model, seed=5)),
    ):
        with make_plan() as plan:
            prints.append(plan.fingerprint)
    assert len(set(prints)) == 4
    with train_only(copy.deepcopy(model), units) as plan:
        assert plan.fingerprint == prints[0]


def test_digest_depends_on_content_alone() -> None:
    weight = torch.randn(6, 4)
    assert digest([weight]) == digest([weight[:2], weight[2:]])
    assert digest([weight.t()]) == digest([weight.t().contiguous()])
    assert digest([weight]) != digest([weight.double()])
    flipped = weight.clone()
    flipped.view(torch.int32)[3, 1] ^= 1
    assert digest([weight]) != digest([flipped])
    rest = complement_rows(weight, (1,), torch.tensor([1, 3]))
    assert torch.equal(rest, weight[:, [0, 2]].t())


def test_a_folder_that_is_not_there_is_not_fetched_from_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever owns a repository of that name could put any weights there."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for name in ("runs/typo", "/nowhere/at/all", "typo", Path("runs/typo")):
        with pytest.raises(FileNotFoundError, match=f"there is no folder '{name}'"):
            load_update(tiny_models.build("llama"), name)
