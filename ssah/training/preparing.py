"""A trainer under a plan whose parts read weights by name, or pair them with another model's.

Example: GRPO with vLLM sends ``for name, p in model.named_parameters()`` to the engine before it
generates. Under a plan that would be ``down_proj.weight_trained [3, hidden]``, which no engine has.
Inside the block that is put around it here it is ``down_proj.weight [hidden, 12]``, whole.

What else is changed: ``sync_ref_model=True`` pairs the parameters of two models by position, and
sees the same. ``trl.BEMACallback`` pairs what trains with the parameters of a model that it makes:
it gets a copy of the model under the plan instead, of which it moves the slices alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ssah.compat.peft import inner_model
from ssah.compat.trl import averages, reference_syncs, sends_weights, weight_sync
from ssah.training.plan import UpdatePlan, plan_of


def prepare_trainer(plan: UpdatePlan, trainer: Any) -> None:
    """Let a trainer of transformers or TRL see whole weights wherever it reads them by name.

    Call it once, between making the trainer and ``trainer.train()``. What is done is undone with
    the plan: after ``plan.close()`` every part runs as it did.

    Raises:
        TypeError: ``plan`` is none.
        RuntimeError: it is closed.
        ValueError: the trainer has another model, has put adapters on it, would copy it to several
            GPUs or shard it, sends weights to vLLM in a way that is not known here, or averages
            or pairs weights of a sharded model.
    """
    if not isinstance(plan, UpdatePlan):
        raise TypeError(
            f"plan is a {type(plan).__name__}, must be what ssah.freeze or ssah.train_only gave: "
            "prepare_trainer(plan, trainer)"
        )
    syncs = [each for each in reference_syncs(trainer) if each.ref_model is not None]
    _check(plan, trainer, syncs)
    # A sharded plan splits nothing: names and shapes are those from before.
    if not plan._installed.sharded:
        if sends_weights(trainer):
            _see_whole_weights(plan, *_known_sync(trainer))
        for sync in syncs:
            # A copy that was made under the plan has its slices too: they are paired as they are.
            if plan_of(sync.ref_model) is None:
                _see_whole_weights(plan, sync, "on_step_end")
        for average in averages(trainer):
            _average_slices(plan, average)
    plan._installed.unprepared_for = None


def _check(plan: UpdatePlan, trainer: Any, syncs: list[Any]) -> None:
    """Refuse what cannot be prepared, before anything is changed."""
    plan._check_open()
    if inner_model(trainer.model) is plan.model:
        raise ValueError(
            "trainer has put adapters on the plan's model (peft_config=), must train without them: "
            "give it no peft_config; or make no plan, and keep units with "
            "ssah.training.AdapterCallback"
        )
    if trainer.model is not plan.model:
        raise ValueError(
            f"trainer has another {type(trainer.model).__name__} than the plan, must have the "
            "model that the plan was made for: give both the same"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"trainer would copy the model to {trainer.args.n_gpu} GPUs (torch.nn.DataParallel), "
            "must use one in each process: set CUDA_VISIBLE_DEVICES=0, or start it with torchrun"
        )
    for name, enabled in (
        ("FSDP", trainer.is_fsdp_enabled and not plan._installed.sharded),
        ("DeepSpeed", trainer.is_deepspeed_enabled),
    ):
        if enabled:
            raise ValueError(
                f"trainer would shard the model with {name} after its plan was made, must leave it "
                "whole: use DistributedDataParallel (torchrun without a sharding plugin); or FSDP2 "
                "with plan.optimizer_cls_and_kwargs(args), which the plan follows"
            )
    if plan._installed.sharded and (averages(trainer) or syncs):
        raise ValueError(
            "trainer averages weights or updates a reference model, must not do so while the model "
            "is sharded: leave out BEMACallback and sync_ref_model"
        )
    if sends_weights(trainer):
        _known_sync(trainer)
    for sync in syncs:
        _check_pairs(plan, sync.ref_model)


def _known_sync(trainer: Any) -> tuple[Any, str]:
    """Where the trainer hands weights to vLLM."""
    found = weight_sync(trainer)
    if found is None:
        raise ValueError(
            f"trainer is a {type(trainer).__name__}, which sends weights to vLLM in a way that is "
            "not known here, must be one of GRPO, RLOO, online DPO and those that send as they do: "
            "take one of them, or generate without vLLM (use_vllm=False)"
        )
    return found


def _check_pairs(plan: UpdatePlan, reference: nn.Module) -> None:
    """Refuse a reference model whose parameters are not those of the model, one by one."""
    twin = plan_of(reference) is not None
    every = plan.model.named_parameters() if twin else plan.original_named_parameters()
    own = {name: tuple(p.shape) for name, p in every}
    theirs = {name: tuple(p.shape) for name, p in reference.named_parameters()}
    for name in own | theirs:
        if own.get(name) != theirs.get(name):
            raise ValueError(
                f"trainer.ref_model has {theirs.get(name, 'nothing')} for {name!r}, must have "
                f"{own.get(name, 'nothing')} as the model has: sync_ref_model=True needs two "
                "models of one kind, both with the same plan or the reference without any"
            )


@contextmanager
def _whole_weights(plan: UpdatePlan) -> Iterator[None]:
    """Inside the block the model's parameters have the names and shapes from before the plan."""

    def named_parameters(prefix: str = "", *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        for name, value in plan.original_named_parameters():
            yield f"{prefix}.{name}" if prefix else name, value

    own = vars(plan.model)
    before = own.get("named_parameters")
    own["named_parameters"] = named_parameters  # nn.Module.parameters() asks it too
    try:
        yield
    finally:
        if before is None:
            del own["named_parameters"]
        else:
            own["named_parameters"] = before


def _see_whole_weights(plan: UpdatePlan, owner: Any, method: str) -> None:
    """Put the block around a method of an object."""
    run: Callable[..., Any] = getattr(owner, method)

    @wraps(run)
    def seeing(*args: Any, **options: Any) -> Any:
        if plan.closed:
            return run(*args, **options)
        with _whole_weights(plan):
            return run(*args, **options)

    setattr(owner, method, seeing)


def _average_slices(plan: UpdatePlan, average: Any) -> None:
    """Let a BEMACallback average what trains, in a copy of the model that has the same slices.

    What is frozen is in no parameter, so that the average has it bit for bit: of whole weights,
    ``(1 - beta) * w + beta * w`` would round it.
    """
    begin, end = average.on_train_begin, average.on_train_end

    @wraps(begin)
    def on_train_begin(*args: Any, **options: Any) -> Any:
        result = begin(*args, **options)
        if not plan.closed:
            average.running_model = None  # frees the plain copy before there is another
            running = copy.deepcopy(plan.model).to(average.device)
            # One that a trainer has put there goes on with the weights of the model it was put on.
            vars(running).pop("forward", None)
            slices = plan_of(running)
            assert slices is not None
            # The callback pairs what trains with all parameters of its copy, by position.
            vars(running)["parameters"] = lambda recurse=True: slices.parameters()
            average.running_model = running
        return result

    @wraps(end)
    def on_train_end(*args: Any, **options: Any) -> Any:
        result = end(*args, **options)
        slices = plan_of(average.running_model)
        if slices is not None:
            del average.running_model.parameters
            slices.close()  # what was averaged is an ordinary model
        return result

    average.on_train_begin, average.on_train_end = on_train_begin, on_train_end
