"""Several processes: scores joined across ranks, errors on every rank, and training."""

from __future__ import annotations

import functools
import io
import os
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_models
import torch
import torch.distributed as dist
from plans import draw, loss_on, make, masks, snapshot
from ranks import (
    MODES,
    PATIENCE,
    assert_close,
    batches,
    expect,
    rows_of,
    same_bits,
    sharded,
    start,
    train,
)
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from typer.testing import CliRunner

from ssah.attribution import METRICS, Attribution, attribute
from ssah.cli import app
from ssah.distributed import Ranks, deal, launched
from ssah_kernels.sharded import first_row, local

# ------------------------------------------------------------------------------------ scoring


def score(rank: int, n: int, folder: Path) -> None:
    model = tiny_models.build("llama")
    for metric in METRICS:
        result = attribute(model, deal(batches()), metric=metric)
        assert same_bits(result)
        result.save(folder / f"{metric}-{rank}")
    own = batches(2)[rank : rank + 1]  # with four ranks, two have nothing
    result = attribute(model, own)
    assert same_bits(result)
    result.save(folder / f"few-{rank}")
    bar = io.StringIO()
    with redirect_stderr(bar):
        attribute(model, deal(batches()), tokens="all", progress=True)
    assert ("scoring units" in bar.getvalue()) == (rank == 0)
    alone = attribute(model, batches(2), process_group=None)
    assert_close(alone, result, 1e-12)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_ranks_together_score_what_one_process_scores(tmp_path: Path, n: int) -> None:
    start(score, n, tmp_path)
    model = tiny_models.build("llama")
    expected = {metric: attribute(model, batches(), metric=metric) for metric in METRICS}
    expected["few"] = attribute(model, batches(2))
    for name, one in expected.items():
        for rank in range(n):
            assert_close(Attribution.load(tmp_path / f"{name}-{rank}"), one, 1e-12)


def fail(rank: int, n: int, folder: Path) -> None:
    odd = rank == 1
    mine = batches()[rank::n]
    spoilt = [*mine[:1], {**mine[1], "labels": mine[1]["labels"][:, 1:]}]
    expect(ValueError, "batch 1: labels have shape", rank, 1, loader=spoilt if odd else mine)

    def breaking() -> Any:
        yield mine[0]
        raise OSError("the disk is gone")

    expect(OSError, "the disk is gone", rank, 1, loader=breaking() if odd else mine)
    model = tiny_models.build("llama")
    if odd:  # what a faulty machine computes
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: args[2] * torch.nan)
    for metric in ("variance", "taylor"):
        expect(FloatingPointError, "layers.1.mlp.down_proj", rank, 1, model=model, metric=metric)
    expect(ValueError, "metric is 'size'", rank, 1, metric="size" if odd else "norm")
    expect(ValueError, "metric is 'norm' on rank 1", rank, None, metric=METRICS[rank == 1])
    unlabelled = batches(labels=False)[rank::n]
    expect(ValueError, "tokens is 'all' on rank 1", rank, None, loader=unlabelled if odd else mine)
    expect(ValueError, "same batches on all", rank, None, loader=batches())
    expect(ValueError, "loader yielded no batch", rank, None, loader=[])
    other = tiny_models.build("qwen2") if odd else tiny_models.build("llama")
    expect(ValueError, "config_hash is", rank, None, model=other)
    other = tiny_models.build("llama", seed=1) if odd else tiny_models.build("llama")
    expect(ValueError, "weights_hash is", rank, None, model=other)
    other = nn.Linear(2, 2) if odd else tiny_models.build("llama")
    expect(TypeError, "must be a transformers", rank, 1, model=other)
    with pytest.raises(ValueError, match="must be 'auto', None"):
        Ranks.of("all")
    with pytest.raises(TypeError, match="a process group"):
        Ranks.of(3)
    assert same_bits(attribute(tiny_models.build("llama"), deal(batches())))  # still in step


def test_an_error_on_one_rank_is_an_error_on_every_rank(tmp_path: Path) -> None:
    start(fail, 2, tmp_path)


def die(rank: int, n: int, folder: Path) -> None:
    def loader() -> Any:
        yield batches(1)[0]
        if rank == 1:
            os._exit(9)

    with pytest.raises(RuntimeError, match=f"rank {rank} of {n} waited for the others in vain"):
        attribute(tiny_models.build("llama"), loader())
    os._exit(0)


def test_a_rank_that_dies_leaves_a_clear_error(tmp_path: Path) -> None:
    context = start(die, 3, tmp_path, join=False)
    for process in context.processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in context.processes] == [0, 9, 0]


# ------------------------------------------------------------------------------- command line


def command(rank: int, n: int, folder: Path, ports: list[int]) -> None:
    """What a process that torchrun starts does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    arguments = ["attribute", str(folder / "model"), "--data", "builtin:utility", "--limit", "20"]
    arguments += ["--batch-size", "3", "--max-length", "48", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(folder / "ranks")])
    assert result.exit_code == 0, result.output
    assert ('"processes": 2' in result.stdout) == (rank == 0)
    assert rank == 0 or result.stdout == ""
    os.environ["MASTER_PORT"] = str(ports[1])
    wrong = CliRunner().invoke(app, [*arguments, "--out", str(folder / "model" / "config.json")])
    assert wrong.exit_code == 2
    assert "config.json" in wrong.stderr


def test_command_under_a_launcher(tmp_path: Path) -> None:
    tiny_chat.save(tmp_path / "model")
    # Ports that are free now, as a launcher chooses its own.
    held = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in "12"]
    ports = [store.port for store in held]
    del held
    start_processes(command, args=(2, tmp_path, ports), nprocs=2, start_method="fork")
    arguments = ["attribute", str(tmp_path / "model"), "--data", "builtin:utility", "--limit", "20"]
    arguments += ["--batch-size", "3", "--max-length", "48", "--out", str(tmp_path / "one")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert_close(Attribution.load(tmp_path / "ranks"), Attribution.load(tmp_path / "one"), 1e-12)
    with launched() as ranks:
        assert ranks.size == 1


# ----------------------------------------------------------------------------------- training

STEPS, HALF = 20, 10
# Mode -> what is trained in it: also five experts, of which the last of four ranks has none.
TRAINED = {"freeze": "llama_bias", "train_only": "qwen2_moe"}
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}


@functools.cache
def one_process(mode: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = tiny_models.build(TRAINED[mode], dtype=dtype)
    plan = make(model, mode)
    train(model, plan.optimizer(**OPTIONS), range(STEPS))
    plan.close()
    return snapshot(model)


def assert_trained_alike(folder: Path, mode: str) -> None:
    """What ranks trained is as near to a float64 run as one process comes in float32."""
    ours = torch.load(folder / f"{mode}.pt")
    one, exact = one_process(mode, torch.float32), one_process(mode, torch.float64)
    start = tiny_models.build(TRAINED[mode])
    trains = masks(start, draw(start), mode)
    for name, before in start.state_dict().items():
        moved = ours[name] != before
        assert not bool((moved & (trains[name] == 0)).any()), name
        assert bool(moved.any()) == bool(trains[name].any()), name
    far = {
        key: max(float((run[name].double() - exact[name]).abs().max()) for name in exact)
        for key, run in (("ours", ours), ("one", one))
    }
    assert far["ours"] <= 4 * far["one"], far


def ddp(rank: int, n: int, folder: Path) -> None:
    for mode, family in TRAINED.items():
        model = tiny_models.build(family)
        trained = sum(int(mask.sum()) for mask in masks(model, draw(model), mode).values())
        plan = make(model, mode)
        parallel = nn.parallel.DistributedDataParallel(model)
        sent = []

        # DDP reads annotations itself, and would not know these: they are strings.
        def count(state, bucket, sent=sent):  # type: ignore[no-untyped-def]
            sent.append(bucket.buffer().nbytes)
            return allreduce_hook(dist.group.WORLD, bucket)

        parallel.register_comm_hook(None, count)
        train(parallel, plan.optimizer(**OPTIONS), range(STEPS), rank, n)
        assert sum(sent) == STEPS * trained * 4
        plan.verify()
        if rank == 0:
            torch.save(snapshot(model), folder / f"{mode}.pt")


def test_ddp_sends_trained_gradients_alone(tmp_path: Path) -> None:
    start(ddp, 2, tmp_path)
    for mode in MODES:
        assert_trained_alike(tmp_path, mode)


# ------------------------------------------------------------------------------------ sharded


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.full_tensor().clone() for name, value in model.state_dict().items()}


def checkpoint(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    parts = get_state_dict(model, optimizer)
    return dict(zip(("model", "optimizer"), parts, strict=True))


def score_and_train(rank: int, n: int, folder: Path) -> None:
    model = sharded(n)
    for metric in ("taylor", "variance"):
        own = batches(3)[rank::n]  # two and one: the second rank waits in step
        result = attribute(model, own, metric=metric)
        assert same_bits(result)
        result.save(folder / f"{metric}-{rank}")
    for mode, family in TRAINED.items():
        model = sharded(n, family)
        plan = make(model, mode)
        optimizer = plan.optimizer(**OPTIONS)
        train(model, optimizer, range(HALF), rank, n)
        plan.verify()
        dcp.save(checkpoint(model, optimizer), checkpoint_id=folder / f"{mode}-half")
        train(model, optimizer, range(HALF, STEPS), rank, n)
        plain = tiny_models.build(family)
        trains = masks(plain, draw(plain), mode)
        for name, p in plan.named_parameters():  # what clipping sees
            assert not bool(p.grad.full_tensor()[trains[name] == 0].any()), name
        with torch.no_grad():
            model(**rows_of(0))  # leaves weights gathered
        plan.verify()
        state = whole(model)
        if rank == 0:
            torch.save(state, folder / f"{mode}.pt")


def refuse(rank: int, n: int, folder: Path) -> None:
    model = sharded(n)
    loader = batches(2)
    if rank == 1:
        loader[1] = {"input_ids": torch.zeros(3)}
    expect(TypeError, "batch 1: input_ids", rank, 1, model=model, loader=loader)
    with pytest.raises(ValueError, match="process_group has 1 ranks"):
        attribute(model, batches(1), process_group=None)
    plan = make(model, "train_only")
    optimizer = torch.optim.AdamW(plan.param_groups())
    loss_on(model, rows_of(0, rank, n)).backward()
    with pytest.raises(TypeError, match=r"plan\.optimizer"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"must be None \(clip with "):
        plan.optimizer(max_norm=1.0)
    with pytest.raises(ValueError, match="call save_pretrained on every rank"):
        plan.push_to_hub("someone/update")
    for group in (state := plan.optimizer().state_dict())["param_groups"]:
        state["state"] |= {n: {"exp_avg": torch.zeros(3)} for n in group["params"]}
    with pytest.raises(ValueError, match="must be a DTensor sharded alike"):
        plan.optimizer().load_state_dict(state)
    plan.verify()
    weight = model.model.layers[1].mlp.up_proj.weight
    if rank == 1:
        frozen = (~plan.entries["model.layers.1.mlp.up_proj.weight"].trains).nonzero()[-1, 0]
        local(weight)[int(frozen) - first_row(weight), 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"entries of model\.layers\.1\.mlp\.up_proj"):
        plan.verify()
    plan.close()
    assert all(p.requires_grad for p in model.parameters())
    model = sharded(n, "gpt_oss")
    plan = make(model, "freeze")
    name = "model.layers.1.mlp.experts.down_proj"
    if rank == 1:  # the last of four experts
        frozen = (~plan.entries[name].trains.view(4, -1)[3]).nonzero()[0, 0]
        local(model.get_parameter(name))[1, frozen, 0] += 1e-3
    with pytest.raises(RuntimeError, match=f"entries of {name}"):
        plan.verify()
    plan.close()
    scattered = tiny_models.build("llama")
    fully_shard(scattered.model.layers[0].mlp.up_proj, mesh=init_device_mesh("cpu", (n,)))
    with pytest.raises(ValueError, match="is sharded by itself"):
        attribute(scattered, batches(2)[rank::n])
    with pytest.raises(ValueError, match="is not sharded, must be like"):
        make(scattered, "freeze")


def resume(rank: int, n: int, folder: Path) -> None:
    for mode, family in TRAINED.items():
        model = sharded(n, family)
        plan = make(model, mode)
        optimizer = plan.optimizer(**OPTIONS)
        state = checkpoint(model, optimizer)
        dcp.load(state, checkpoint_id=folder.parent / "two" / f"{mode}-half")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        train(model, optimizer, range(HALF, STEPS), rank, n)
        result = whole(model)
        if rank == 0:
            torch.save(result, folder / f"{mode}.pt")


@pytest.mark.parametrize(
    "others", [{1: "one"}, pytest.param({4: "four"}, marks=pytest.mark.exhaustive)]
)
def test_sharded_by_fully_shard(others: dict[int, str], tmp_path: Path) -> None:
    start(score_and_train, 2, tmp_path / "two")
    model = tiny_models.build("llama_bias")
    # The loss of a sharded model is taken of all positions at once: another order in float32.
    for metric, tolerance in (("variance", 1e-12), ("taylor", 1e-6)):
        one = attribute(model, batches(3), metric=metric)
        for rank in range(2):
            assert_close(Attribution.load(tmp_path / "two" / f"{metric}-{rank}"), one, tolerance)
    for n, name in others.items():
        start(resume, n, tmp_path / name)
    for name in ("two", *others.values()):
        for mode in MODES:
            assert_trained_alike(tmp_path / name, mode)


def test_what_a_sharded_model_refuses(tmp_path: Path) -> None:
    start(refuse, 2, tmp_path)
