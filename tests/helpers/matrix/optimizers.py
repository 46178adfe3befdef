"""Optimisers in a loop of one's own, and what people put around a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from matrix.rows import Attempt, Setting, refused, works
from plans import draw, loss_of
from torch import optim

from ssah.training import UpdatePlan, freeze
from ssah_kernels.optim import MaskedAdamW, MaskedSGD

LOOP = "Optimisers in a loop of your own"
AROUND = "Around a step"


def of(kind: Callable[..., Any], **options: Any) -> Callable[[UpdatePlan], Any]:
    return lambda plan: kind(plan.parameters(), **{"lr": 1e-2, **options})


def of_torchao(name: str) -> Callable[[UpdatePlan], Any]:
    """As :func:`of`; who makes it without torchao skips the test."""

    def made(plan: UpdatePlan) -> Any:
        return of(getattr(pytest.importorskip("torchao.optim"), name))(plan)

    return made


def muon_and_adamw(plan: UpdatePlan) -> Any:
    matrices = [p for p in plan.parameters() if p.dim() == 2]
    others = [p for p in plan.parameters() if p.dim() != 2]
    return optim.Muon(matrices, lr=1e-2), optim.AdamW(others, lr=1e-2)


EIGHT_BIT = "States of 8 bits are those of the trained slices alone."
# Situation -> what makes the optimiser, and what there is to know.
EVERY: dict[str, tuple[Callable[[UpdatePlan], Any], str]] = {
    "`plan.optimizer()`": (
        lambda plan: plan.optimizer(lr=1e-2, weight_decay=0.1),
        "AdamW. Checkpoints of `torch.optim.AdamW` can be loaded.",
    ),
    "`plan.optimizer(state_dtype=torch.bfloat16)`": (
        lambda plan: plan.optimizer(lr=1e-2, state_dtype=torch.bfloat16),
        "Moments of 16 bits.",
    ),
    '`plan.optimizer(rounding="remainder")`, `max_norm=1.0`': (
        lambda plan: plan.optimizer(lr=1e-2, rounding="remainder", max_norm=1.0),
        "It clips inside the update.",
    ),
    "`plan.optimizer(in_backward=True)`": (
        lambda plan: plan.optimizer(lr=1e-2, in_backward=True),
        "No gradient is kept. [What is refused](../memory.md#what-in_backwardtrue-changes)",
    ),
    "`MaskedAdamW`, `MaskedSGD`": (
        lambda plan: (
            MaskedAdamW([p for p in plan.parameters() if p.dim() > 1], lr=1e-2),
            MaskedSGD([p for p in plan.parameters() if p.dim() == 1], lr=1e-2, momentum=0.9),
        ),
        "",
    ),
    "`AdamW(foreach=True)`": (of(optim.AdamW, foreach=True), ""),
    "`AdamW(fused=True)`": (of(optim.AdamW, fused=True), ""),
    "`Adam(amsgrad=True)`": (of(optim.Adam, amsgrad=True), ""),
    "`NAdam`, `RAdam`": (
        lambda plan: (
            optim.NAdam([p for p in plan.parameters() if p.dim() > 1], lr=1e-2),
            optim.RAdam([p for p in plan.parameters() if p.dim() == 1], lr=1e-2),
        ),
        "",
    ),
    "`Adamax`": (of(optim.Adamax), ""),
    "`Adagrad`": (of(optim.Adagrad), ""),
    "`Adadelta`": (of(optim.Adadelta, lr=1.0), ""),
    "`RMSprop`": (of(optim.RMSprop, momentum=0.9), ""),
    "`Rprop`": (of(optim.Rprop), ""),
    "`ASGD`": (of(optim.ASGD), ""),
    "`SGD` with Nesterov momentum and decay": (
        of(optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
        "Neither decay nor old momentum moves what is frozen.",
    ),
    "`Adafactor` of torch": (
        of(optim.Adafactor),
        "Rows and columns are factored over the trained slice, not over the whole weight.",
    ),
    "`Adafactor` of transformers": (
        of(transformers.Adafactor, scale_parameter=False, relative_step=False),
        "The same.",
    ),
    "`Muon`": (
        muon_and_adamw,
        "It orthogonalises each trained slice. The slices of down and O are transposed.",
    ),
    "bitsandbytes `AdamW8bit`": (of(bitsandbytes.optim.AdamW8bit, min_8bit_size=16), EIGHT_BIT),
    "bitsandbytes `Lion8bit`": (of(bitsandbytes.optim.Lion8bit, min_8bit_size=16), EIGHT_BIT),
    "bitsandbytes `AdEMAMix8bit`": (
        of(bitsandbytes.optim.AdEMAMix8bit, min_8bit_size=16),
        EIGHT_BIT,
    ),
    "torchao `AdamW8bit`": (of_torchao("AdamW8bit"), EIGHT_BIT),
    "torchao `AdamW4bit`": (of_torchao("AdamW4bit"), ""),
}


def trains_with(
    make_optimizer: Callable[[UpdatePlan], Any], *, packs: bool
) -> Callable[[Setting], None]:
    def proof(setting: Setting) -> None:
        made = make_optimizer(setting.plan)
        # torchao compiles its updates, which takes longer than all of this file.
        with torch.compiler.set_stance("force_eager"):
            setting.steps(*(made if isinstance(made, tuple) else (made,)))
        if packs:
            every = [value for state in made.state.values() for value in state.values()]
            assert any("codes" in dir(v) or getattr(v, "dtype", 0) == torch.uint8 for v in every)

    return proof


# A few of each kind: the others only add to them.
EVERY_TIME = (
    "plan.optimizer()",
    "fused",
    "SGD",
    "of torch",
    "Muon",
    "tes `AdamW8bit`",
    "ao `AdamW8",
)
for name, (make_optimizer, words) in EVERY.items():
    rarely = not any(part in name for part in EVERY_TIME)
    works(LOOP, name, words, exhaustive=rarely)(
        trains_with(make_optimizer, packs=words == EIGHT_BIT)
    )


@works(LOOP, "learning rates by layer", "Find slices in `plan.named_parameters()` by their names.")
def layerwise(setting: Setting) -> None:
    first = [p for name, p in setting.plan.named_parameters() if "layers.0." in name]
    rest = [p for name, p in setting.plan.named_parameters() if "layers.0." not in name]
    setting.steps(optim.AdamW([{"params": first, "lr": 1e-3}, {"params": rest}], lr=1e-2))


@works(
    LOOP, "updates inside the backward pass, of any optimiser", "One a parameter, in a hook of it."
)
def in_backward(setting: Setting) -> None:
    for parameter in setting.plan.parameters():
        optimizer = optim.AdamW([parameter], lr=1e-2)

        def update(p: torch.Tensor, optimizer: optim.Optimizer = optimizer) -> None:
            optimizer.step()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(update)
    setting.steps()


@works(LOOP, "an optimiser of your own that writes to `p.data`", "")
def by_hand(setting: Setting) -> None:
    for seed in range(3):
        loss_of(setting.model, seed).backward()
        for p in setting.plan.parameters():
            assert p.grad is not None
            p.data -= 1e-2 * p.grad
            p.grad = None


@works(LOOP, "sharpness-aware minimisation (SAM)", "Weights are moved and moved back by `add_`.")
def sam(setting: Setting) -> None:
    optimizer = optim.SGD(setting.plan.parameters(), lr=1e-2)
    for seed in range(3):
        loss_of(setting.model, seed).backward()
        away = [0.05 * p.grad for p in setting.plan.parameters() if p.grad is not None]
        with torch.no_grad():
            for p, far in zip(setting.plan.parameters(), away, strict=True):
                p.add_(far)
        optimizer.zero_grad()
        loss_of(setting.model, seed).backward()
        with torch.no_grad():
            for p, far in zip(setting.plan.parameters(), away, strict=True):
                p.sub_(far)
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------- around a step


@works(AROUND, "`clip_grad_norm_(model.parameters(), 1.0)`", "The norm is that of what trains.")
def clip_norm(setting: Setting) -> None:
    model = setting.model

    def clip() -> None:
        gradients = [p.grad for p in setting.plan.parameters() if p.grad is not None]
        expected = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.testing.assert_close(float(norm), expected, rtol=1e-4, atol=0)

    setting.steps(setting.plan.optimizer(lr=1e-2), each=clip)


@works(AROUND, "`clip_grad_value_`", exhaustive=True)
def clip_value(setting: Setting) -> None:
    def clip() -> None:
        torch.nn.utils.clip_grad_value_(setting.plan.parameters(), 0.1)

    setting.steps(setting.plan.optimizer(lr=1e-2), each=clip)


def scheduled(make_schedule: Callable[[Any], Any]) -> Callable[[Setting], None]:
    def proof(setting: Setting) -> None:
        optimizer = setting.plan.optimizer(lr=1e-2)
        schedule = make_schedule(optimizer)
        rates = set()
        for seed in range(3):
            setting.steps(optimizer, n=1)
            plateau = isinstance(schedule, optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(*([float(seed)] if plateau else []))
            rates.add(optimizer.param_groups[0]["lr"])
        assert len(rates) == 3

    return proof


works(AROUND, "`LambdaLR`, and schedules of transformers", "")(
    scheduled(lambda o: transformers.get_cosine_schedule_with_warmup(o, 1, 5))
)
works(AROUND, "`OneCycleLR`", exhaustive=True)(
    scheduled(lambda o: optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=5))
)
works(AROUND, "`ReduceLROnPlateau`", exhaustive=True)(
    scheduled(lambda o: optim.lr_scheduler.ReduceLROnPlateau(o, patience=0))
)


@works(AROUND, "`torch.amp.GradScaler`", "")
def scaler(setting: Setting) -> None:
    optimizer = setting.plan.optimizer(lr=1e-2)
    scale = torch.amp.GradScaler("cpu", init_scale=256.0)
    for seed in range(3):
        optimizer.zero_grad()
        scale.scale(loss_of(setting.model, seed)).backward()
        scale.step(optimizer)
        scale.update()


@works(AROUND, "`zero_grad(set_to_none=False)`", exhaustive=True)
def zeros(setting: Setting) -> None:
    optimizer = optim.AdamW(setting.plan.parameters(), lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(setting.model, seed).backward()
        optimizer.step()


@works(AROUND, "`optimizer.state_dict()` and `load_state_dict` under the same plan", "")
def resumed(setting: Setting) -> None:
    first = setting.plan.optimizer(lr=1e-2)
    setting.steps(first)
    second = setting.plan.optimizer(lr=1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    setting.steps(second)


@refused(
    AROUND,
    "an optimiser that was made before the plan",
    "parameters that the plan has replaced",
    "It would train nothing of them. Make it after the plan.",
)
def made_before(setting: Setting) -> Attempt:
    setting.plan.close()
    old = optim.AdamW(setting.model.parameters(), lr=1e-2)
    freeze(setting.model, setting.units)
    loss_of(setting.model).backward()
    return old.step


@refused(
    AROUND,
    "the optimiser of a plan that was closed",
    "train under no plan in force",
    "It would train only what was never split. Make a plan, and its optimiser.",
)
def closed(setting: Setting) -> Attempt:
    optimizer = setting.plan.optimizer(lr=1e-2)
    setting.steps(optimizer, n=1)
    setting.plan.close()
    loss_of(setting.model).backward()
    return optimizer.step


@refused(
    AROUND,
    "resuming `plan.optimizer()` with other units",
    "the optimiser state was saved under another plan",
    "Resume with the same units.",
)
def other_units(setting: Setting) -> Attempt:
    optimizer = setting.plan.optimizer(lr=1e-2)
    setting.steps(optimizer, n=1)
    setting.plan.close()
    other = freeze(setting.model, draw(setting.model, seed=9)).optimizer(lr=1e-2)
    return lambda: other.load_state_dict(optimizer.state_dict())


@refused(
    AROUND,
    "a learning rate that a schedule makes NaN or negative",
    "lr is nan",
    "No weight is touched. Correct the schedule.",
)
def bad_rate(setting: Setting) -> Attempt:
    optimizer = setting.plan.optimizer(lr=1e-2)
    optimizer.param_groups[0]["lr"] = float("nan")
    loss_of(setting.model).backward()
    return optimizer.step
