"""``ssah finetune`` in several processes: one writes and tells, and all end alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from plans import assert_equal, snapshot
from ranks import start
from tiny_chat import word_tokenizer
from tiny_models import build
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from typer.testing import CliRunner

from ssah.cli import app
from ssah.compat.accelerate import forget_prepared, unconverted_forward
from ssah.distributed import Ranks
from ssah.training import load_update
from ssah.training.finetune import trainer

ROWS = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": f"w{2 * i} w5 w7"} for i in range(8)]
KEPT = ("--freeze", "none", "--keep", "*mlp*", "--lr", "0.01", "--max-steps", "6")
OFTEN = ("--save-steps", "3", "--logging-steps", "1", "--json", "--device", "cpu")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    for name in ("rows", "other"):
        rows = ROWS if name == "rows" else ROWS[::-1]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def command(place: Path, out: str, *options: str) -> list[str]:
    rows = str(place / "rows.jsonl")
    given = ["finetune", str(place / "base"), "--data", rows, "--eval-data", rows, *KEPT, *OFTEN]
    return [*given, "--out", str(place / out), *options]


def updated(place: Path, out: str) -> dict[str, Tensor]:
    model = build("llama")
    load_update(model, place / out)
    return snapshot(model)


def train(rank: int, n: int, folder: Path) -> None:
    place = folder.parent
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the group is there already
    options = command(place, "two", "--batch-size", "1", "--merge")
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert (done.stdout != "") == (rank == 0)
    assert ("loss" in done.stderr) == (rank == 0), done.stderr
    if rank == 0:
        found = json.loads(done.stdout)
        assert (found["processes"], found["steps"], found["resumed_from"]) == (2, 6, 0)
        (place / "found.json").write_text(done.stdout)

    steps, calls = Trainer.training_step, [0]

    def fail_in_the_fifth(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("cut off")
        return steps(*args, **kwargs)

    Trainer.training_step = fail_in_the_fifth  # type: ignore[method-assign]
    cut = command(place, "cut", "--batch-size", "1")
    assert CliRunner().invoke(app, cut).exit_code == 1
    Trainer.training_step = steps  # type: ignore[method-assign]
    sealed = json.loads((place / "cut/checkpoints/checkpoint-3/seal.json").read_text())
    assert {f"rng_state_{other}.pth" for other in range(n)} <= set(sealed["files"])
    assert CliRunner().invoke(app, cut).exit_code == 0

    # What one refuses, all refuse: data that differ, and what only the first process looks at.
    other = command(place, "other", "--batch-size", "1")
    if rank == 1:
        other[3] = str(place / "other.jsonl")
    wrong = CliRunner().invoke(app, other)
    assert wrong.exit_code == 2
    assert "data is" in wrong.stderr
    assert not (place / "other").exists()
    taken = CliRunner().invoke(app, command(place, "base"))
    assert taken.exit_code == 2
    assert "which is the folder of the model" in taken.stderr
    assert Ranks.of().size == n


def test_processes_train_what_one_process_trains(place: Path) -> None:
    start(train, 2, place / "ranks")
    one = CliRunner().invoke(app, command(place, "one", "--batch-size", "2"))
    assert one.exit_code == 0, one.output
    ours, wanted = updated(place, "two"), updated(place, "one")
    base = snapshot(build("llama"))
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
        assert torch.equal(ours[name], base[name]) == ("mlp" in name), name
    assert_equal(updated(place, "cut"), ours)
    found, alone = json.loads((place / "found.json").read_text()), json.loads(one.stdout)
    for name in ("loss_first", "loss_last", "eval_loss", "eval_loss_before"):
        assert found[name] == pytest.approx(alone[name], rel=1e-4), name
    assert not (place / "two" / "checkpoints").exists()
    assert (place / "two" / "merged" / "model.safetensors").is_file()
    # Another number of processes has other batches: it is another run.
    again = CliRunner().invoke(app, command(place, "two", "--batch-size", "1"))
    assert again.exit_code == 2
    assert "of a run that differs" in again.stderr


def test_a_model_that_was_evaluated_is_as_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # A process has one precision: that of the first test which made an Accelerator.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    model = build("llama")
    plain = dict(vars(model))
    for _ in range(2):
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
        assert unconverted_forward(model).__func__ is type(model).forward
        forget_prepared(model)
        assert vars(model).keys() == plain.keys()


def train_sharded(rank: int, n: int, folder: Path) -> None:
    """As ``accelerate launch`` with FSDP2 starts it, on CPUs that accelerate takes for GPUs."""
    place = folder.parent
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_FSDP": "true"}
    os.environ |= {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    made = trainer.training_arguments

    def arguments(**options: Any) -> Any:
        result = made(**options)
        PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return result

    trainer.training_arguments = arguments  # type: ignore[assignment]
    options = command(place, "sharded", "--batch-size", "1")
    refused = CliRunner().invoke(app, options)
    assert refused.exit_code == 2
    assert "eval_examples must be left out under FSDP2" in refused.stderr
    assert not (place / "sharded" / "meta.json").exists()
    options = [each for i, each in enumerate(options) if i not in (4, 5)]  # --eval-data and its
    steps, calls = Trainer.training_step, [0]

    def fail_in_the_fifth(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(model, FSDPModule)
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("cut off")
        return steps(self, model, *args, **kwargs)

    Trainer.training_step = fail_in_the_fifth  # type: ignore[method-assign]
    assert CliRunner().invoke(app, options).exit_code == 1
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    if rank == 0:
        assert json.loads(done.stdout)["resumed_from"] == 3


@pytest.mark.exhaustive
def test_a_real_launcher(place: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = command(place, "launched", "--batch-size", "1")
    found = subprocess.run(
        [sys.executable, *launcher, "-m", "ssah.cli", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["processes"] == 2
    assert found.stderr.count("step      1") == 1
    assert CliRunner().invoke(app, command(place, "one", "--batch-size", "2")).exit_code == 0
    ours, wanted = updated(place, "launched"), updated(place, "one")
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
def test_sharded_processes_train_what_one_process_trains(place: Path) -> None:
    start(train_sharded, 2, place / "ranks")
    assert CliRunner().invoke(app, command(place, "one", "--batch-size", "2")).exit_code == 0
    ours, wanted = updated(place, "sharded"), updated(place, "one")
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
