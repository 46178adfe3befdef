"""A plan first, FSDP2 afterwards: the order of Trainer and of accelerate."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from plans import assert_equal, check_moved, draw, loss_on, make, masks, snapshot
from ranks import ROWS, rows_of, shard, start, train
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import ssah
from ssah.training import PlanCallback, UpdatePlan, load_update
from ssah.training.installing.following import await_sharding

STEPS, HALF = 20, 10
MODES = {"freeze": "llama_bias", "train_only": "llama"}
LAYERS = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


def data() -> list[dict[str, Tensor]]:
    """The rows of all steps, in their order."""
    parts = [rows_of(step) for step in range(STEPS)]
    return [
        {name: values[i] for name, values in part.items()} for part in parts for i in range(ROWS)
    ]


def arguments(folder: Path, n: int, **options: Any) -> TrainingArguments:
    """A step is of the same rows, however many ranks they are dealt to."""
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // n,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": HALF,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.5,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def launched(rank: int, n: int) -> None:
    """What ``torchrun`` says to a process; the process group is there already."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked


def as_accelerators() -> None:
    """accelerate shards nothing on CPUs: it is told that these are GPUs, and goes its way."""
    PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def sharding_arguments(
    folder: Path, rank: int, n: int, *, bf16: bool = False, **fsdp: Any
) -> TrainingArguments:
    launched(rank, n)
    settings = {**LAYERS, **fsdp}
    args = arguments(folder, n, fsdp=True, fsdp_config=settings, ddp_backend="gloo", bf16=bf16)
    as_accelerators()
    return args


def trainer_of(plan: UpdatePlan, args: TrainingArguments, **options: Any) -> Trainer:
    kind_and_kwargs = plan.optimizer_cls_and_kwargs(args)
    return Trainer(
        plan.model,
        args,
        train_dataset=data(),
        optimizer_cls_and_kwargs=kind_and_kwargs,
        **options,
    )


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.full_tensor().clone() for name, value in model.state_dict().items()}


def one_process(folder: Path, mode: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Any]]:
    """The weights that one process ends with, and the norms of gradients that it has clipped."""
    model = tiny_models.build(MODES[mode], dtype=dtype)
    plan = make(model, mode)
    trainer = trainer_of(plan, arguments(folder, 1, save_strategy="no"))
    trainer.train()
    plan.close()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return snapshot(model), norms


def train_and_resume(
    mode: str, resumes: bool, fsdp: dict[str, Any], rank: int, n: int, folder: Path
) -> None:
    """Train from the start, or go on from the checkpoint in the middle."""
    args = sharding_arguments(folder.parent / "two", rank, n, **fsdp)
    if resumes:
        args.output_dir = str(folder)
    model = tiny_models.build(MODES[mode])
    plan = make(model, mode)
    trainer = trainer_of(plan, args, callbacks=[PlanCallback(plan, folder / "update")])
    half = str(folder.parent / "two" / f"checkpoint-{HALF}")
    trainer.train(resume_from_checkpoint=half if resumes else None)
    assert trainer.accelerator.is_fsdp2
    assert plan.closed
    state = whole(model)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    if rank == 0:
        torch.save((state, norms), folder / "end.pt")


def assert_as_one_process(tmp_path: Path, mode: str, runs: list[str]) -> None:
    """As near to a float64 run as one process comes in float32; what is frozen has every bit."""
    before = tiny_models.build(MODES[mode])
    trains = masks(before, draw(before), mode)
    one, norms = one_process(tmp_path / "one process", mode, torch.float32)
    exact, _ = one_process(tmp_path / "exact", mode, torch.float64)
    own = max(float((one[name].double() - exact[name]).abs().max()) for name in exact)
    for run in runs:
        ours, clipped = torch.load(tmp_path / run / "end.pt")
        far = max(float((ours[name].double() - exact[name]).abs().max()) for name in exact)
        assert far <= 4 * own, (run, far, own)
        assert clipped == pytest.approx(norms, rel=1e-4)
        for name, value in before.state_dict().items():
            moved = ours[name] != value
            assert not bool((moved & (trains[name] == 0)).any()), name
            assert bool(moved.any()) == bool(trains[name].any()), name
        updated = tiny_models.build(MODES[mode])
        load_update(updated, tmp_path / run / "update")
        assert_equal(snapshot(updated), ours)


def test_trainer_shards_after_the_plan(tmp_path: Path) -> None:
    run = partial(train_and_resume, "freeze", False, {})
    start(run, 2, tmp_path / "two")
    assert_as_one_process(tmp_path, "freeze", ["two"])
    ours, _ = torch.load(tmp_path / "two" / "end.pt")
    saved = load_file(tmp_path / "two" / f"checkpoint-{STEPS}" / "model.safetensors")
    assert_equal(dict(sorted(saved.items())), dict(sorted(ours.items())))


def under_accelerate(rank: int, n: int, folder: Path) -> None:
    """A loop of accelerate's, of a mixture of experts, ends where the other order does."""
    launched(rank, n)
    PartialState(cpu=True, backend="gloo")
    as_accelerators()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    ends = []
    for order in ("sharded before", "sharded after"):
        model = tiny_models.build("qwen2_moe")
        before, trains = snapshot(model), masks(model, draw(model), "freeze")
        if order == "sharded before":
            optimizer: Any = make(shard(model, n), "freeze").optimizer(lr=1e-2)
        else:
            plan = make(model, "freeze")
            slices = dict(plan.named_parameters())
            model, optimizer = accelerator.prepare(model, plan.optimizer(lr=1e-2))
            names = [name for name, _ in plan.named_parameters()]
            assert names != list(slices)
            assert names == [name for name in trains if bool(trains[name].any())]
        for step in range(3):
            optimizer.zero_grad()
            loss_on(model, rows_of(step, rank, n)).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    assert not bool(p.grad.full_tensor()[trains[name] == 0].any()), name
            optimizer.step()
            if order == "sharded after" and step == 1:
                accelerator.save_state(folder / "state")
        ends.append(whole(model))
    plan.verify()
    assert_equal(ends[1], ends[0])
    for name, value in ends[1].items():
        assert torch.equal(value[trains[name] == 0], before[name][trains[name] == 0]), name
    accelerator.load_state(folder / "state")
    optimizer.zero_grad()
    loss_on(model, rows_of(2, rank, n)).backward()
    optimizer.step()
    assert_equal(whole(model), ends[0])
    plan.close()
    assert all(p.requires_grad for p in model.parameters())


def refuse(rank: int, n: int, folder: Path) -> None:
    """Every rank has the error, before a weight has changed."""
    model = tiny_models.build("llama")
    args = sharding_arguments(folder, rank, n)
    # Slices of other shapes on each rank: DistributedDataParallel would fail in its own words.
    plan = make(model, "freeze", draw(model, 0.3 + 0.1 * rank))
    plain = arguments(folder, n, ddp_backend="gloo")
    assert plain.world_size == n
    with pytest.raises(ValueError, match=r"rank 1 trains other units .*\(first 'model"):
        plan.optimizer_cls_and_kwargs(plain)
    plan.close()
    as_accelerators()
    for units, seed, words in (
        (draw(model, seed=rank), 0, "rank 1 trains other units than rank 0"),
        (draw(model), rank, "frozen entries of model"),
    ):
        model = tiny_models.build("llama", seed=seed)
        plan = make(model, "freeze", units)
        before = snapshot(model)
        trainer = trainer_of(plan, args)
        with pytest.raises((ValueError, RuntimeError), match=words):
            trainer.train()
        for name, value in model.state_dict().items():
            own = value.to_local()
            assert torch.equal(own, before[name].chunk(n)[rank]), name
    model = tiny_models.build("llama")
    plan = make(model, "freeze")
    with pytest.raises(ValueError, match=r"trainer\.optimizer_cls_and_kwargs = "):
        plan.optimizers(args)
    for option in ({"max_norm": 1.0}, {"track_importance": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .* sharded by FSDP2"):
            plan.optimizer_cls_and_kwargs(args, **option)
    single = tiny_models.build("llama")
    some = ssah.units.BitMask.of(torch.arange(48) < 5)
    few = ssah.train_only(single, ssah.select(single, {"model.norm.weight": some}))
    with pytest.raises(ValueError, match=r"single weights of 'model\.norm\.weight'"):
        few.optimizer_cls_and_kwargs(args)
    args.max_grad_norm = 0.0
    with pytest.raises(ValueError, match=r"args\.world_size is 2, must be 1 with in_backward=True"):
        plan.optimizer_cls_and_kwargs(args, in_backward=True)
    assert next(name for name, _ in plan.named_parameters() if "trained" in name)
    trainer = Trainer(model, args, train_dataset=data())  # with an optimiser of its own
    with pytest.raises(RuntimeError, match="give them the plan's own optimiser"):
        trainer.train()
    args = sharding_arguments(folder, rank, n, activation_checkpointing=True)
    model = tiny_models.build("llama")
    with pytest.raises(ValueError, match="has another name since the model was sharded"):
        trainer_of(make(model, "freeze"), args).train()


def in_bfloat16(rank: int, n: int, folder: Path) -> None:
    """accelerate keeps in float32 what trains; what is frozen has the values it had."""
    args = sharding_arguments(folder, rank, n, bf16=True)
    args.max_steps = 2
    model = tiny_models.build("llama_bias", dtype=torch.bfloat16)
    before, trains = snapshot(model), masks(model, draw(model), "freeze")
    plan = make(model, "freeze")
    trainer_of(plan, args, callbacks=[PlanCallback(plan, folder / "update")]).train()
    state = whole(model)
    for name, value in state.items():
        frozen = trains[name] == 0
        assert torch.equal(value[frozen], before[name][frozen].to(value.dtype)), name
        assert torch.equal(value, before[name].to(value.dtype)) != bool(trains[name].any()), name
    if rank == 0:
        base = tiny_models.build("llama_bias", dtype=torch.bfloat16).float()
        load_update(base, folder / "update")
        assert_equal(snapshot(base), state)


@pytest.mark.parametrize(
    "worker",
    [under_accelerate, refuse, pytest.param(in_bfloat16, marks=pytest.mark.exhaustive)],
)
def test_two_ranks(worker: Any, tmp_path: Path) -> None:
    start(worker, 2, tmp_path)


def args_of(kind: str = "MULTI_GPU", **more: Any) -> Any:
    """What a plan reads of ``TrainingArguments``, of a machine that is not here."""
    state = SimpleNamespace(distributed_type=DistributedType(kind))
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    known = {"learning_rate": 1e-3, "weight_decay": 0.0, "world_size": 1, "n_gpu": 1, **betas}
    return SimpleNamespace(distributed_state=state, **{**known, **more})


def test_what_no_plan_can_follow_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    plan = make(model, "freeze")
    names = [name for name, _ in plan.named_parameters()]
    for args, words in (
        (args_of(fsdp_plugin_args={"fsdp_version": 1}), "about to be sharded by FSDP1, .*FSDP2"),
        (args_of("NO", deepspeed_plugin=object()), "about to be sharded by DeepSpeed, .*FSDP2"),
        (args_of("NO", n_gpu=2), "args.n_gpu is 2: .*DataParallel.* CUDA_VISIBLE_DEVICES=0"),
    ):
        with pytest.raises(ValueError, match=words):
            plan.optimizer_cls_and_kwargs(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` says it
    with pytest.raises(ValueError, match="about to be sharded by FSDP1"):
        plan.optimizers(args_of())
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="args ask for FSDP2"):
        plan.optimizers(args_of())
    plan.optimizer_cls_and_kwargs(args_of("MULTI_CPU"))  # accelerate shards nothing there
    assert [name for name, _ in plan.named_parameters()] == names
    loss_on(model, rows_of(0))
    for kind, words in (("FSDP", "sharded by FSDP1"), ("DEEPSPEED", "sharded by DeepSpeed")):
        process = {
            **PartialState(cpu=True)._shared_state,
            "distributed_type": DistributedType(kind),
        }
        plugin = SimpleNamespace(fsdp_version=1)
        monkeypatch.setattr(PartialState, "_shared_state", process)
        monkeypatch.setattr(AcceleratorState, "_shared_state", {**process, "fsdp_plugin": plugin})
        with pytest.raises(ValueError, match=words):
            plan.optimizer()
    other = tiny_models.build("llama")
    with make(other, "freeze"), pytest.raises(RuntimeError, match=r"runs under DeepSpeed \(ZeRO\)"):
        loss_on(other, rows_of(0))  # whatever optimiser it has


def test_a_plan_that_waits_in_vain_trains_all_the_same() -> None:
    """Should nobody shard the model: dense gradients, of which what trains is used."""
    ends = []
    for waits in (False, True):
        model = tiny_models.build("qwen2_moe")
        before, trains = snapshot(model), masks(model, draw(model), "train_only")
        plan = make(model, "train_only")
        old = plan.optimizer(lr=1e-2)
        if waits:
            await_sharding(plan._installed)
            assert not any("trained" in name for name, _ in model.named_parameters())
        optimizer = plan.optimizer(lr=1e-2)
        train(model, optimizer, range(2))
        resumed = plan.optimizer(lr=1e-2)
        resumed.load_state_dict(optimizer.state_dict())
        train(model, resumed, range(2, 3))
        plan.verify()
        if waits:
            with pytest.raises(RuntimeError, match="train under no plan in force"):
                old.step()
        plan.close()
        check_moved(model, before, trains)
        ends.append(snapshot(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("mode", "fsdp"),
    [
        ("freeze", {}),
        (
            "train_only",
            {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
        ),
    ],
)
def test_any_number_of_ranks_resumes(mode: str, fsdp: dict[str, Any], tmp_path: Path) -> None:
    start(partial(train_and_resume, mode, False, fsdp), 2, tmp_path / "two")
    for n, name in ((1, "one"), (4, "four")):
        start(partial(train_and_resume, mode, True, fsdp), n, tmp_path / name)
    assert_as_one_process(tmp_path, mode, ["two", "one", "four"])
