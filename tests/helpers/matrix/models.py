"""What people do with a model while a plan is in force."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import tiny_models
import torch
from accelerate import Accelerator, cpu_offload
from matrix.rows import Attempt, Setting, refused, works
from peft import LoraConfig, get_peft_model
from plans import assert_equal, batch, loss_of, snapshot
from torch import nn
from transformers import AutoModelForCausalLM

import ssah
from ssah.training import freeze
from ssah.units import find_modules

USE = "The model while a plan is in force"
OTHERS = "Several processes, sharding, other memory"
LORA = "Adapters"


def checkpointed(reentrant: bool) -> Any:
    def proof(setting: Setting) -> None:
        model = setting.model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        setting.steps(setting.plan.optimizer(lr=1e-2))

    return proof


works(USE, "gradient checkpointing, `use_reentrant=False`", "")(checkpointed(False))
works(USE, "gradient checkpointing, `use_reentrant=True`", "")(checkpointed(True))


@works(
    USE,
    "gradient checkpointing, `use_reentrant=True`, where embeddings do not train",
    "With `model.enable_input_require_grads()`, as for an adapter.",
    mode="train_only",
)
def reentrant_alone(setting: Setting) -> None:
    model = setting.model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    setting.steps(setting.plan.optimizer(lr=1e-2))


@works(USE, "`torch.autograd.graph.save_on_cpu`", "")
def saved_on_cpu(setting: Setting) -> None:
    with torch.autograd.graph.save_on_cpu():
        setting.steps(setting.plan.optimizer(lr=1e-2))


@works(USE, "`torch.autograd.detect_anomaly`", "", exhaustive=True)
def anomalies(setting: Setting) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        setting.steps(setting.plan.optimizer(lr=1e-2))


@works(
    USE,
    "`torch.compile(model)`, made before the plan",
    "It is compiled anew at its next call.",
    exhaustive=True,
)
def compiled_before(setting: Setting) -> None:
    setting.plan.close()
    compiled = torch.compile(setting.model, backend="aot_eager")
    compiled(**batch())
    plan = freeze(setting.model, setting.units)
    optimizer = plan.optimizer(lr=1e-2)
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(compiled, seed).backward()
        optimizer.step()
    torch._dynamo.reset()


@works(USE, "`model.generate` between steps", "Tokens are those of the model without a plan.")
def generating(setting: Setting) -> None:
    setting.steps(setting.plan.optimizer(lr=1e-2), n=1)
    prompt = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    found = setting.model.generate(prompt, **options)
    plain = type(setting.model)(setting.model.config).eval()
    plain.load_state_dict(setting.model.state_dict())
    assert torch.equal(found, plain.generate(prompt, **options))
    setting.steps(setting.plan.optimizer(lr=1e-2), n=1)


@works(USE, "an evaluation in `torch.inference_mode()` between steps", "")
def evaluating(setting: Setting) -> None:
    optimizer = setting.plan.optimizer(lr=1e-2)
    for _ in range(2):
        setting.steps(optimizer, n=1)
        with torch.inference_mode():
            loss_of(setting.model)


@works(USE, "`model.train()`, `model.eval()`, dropout", "")
def dropping(setting: Setting) -> None:
    for layer in setting.model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    setting.model.train()
    setting.steps(setting.plan.optimizer(lr=1e-2))
    setting.model.eval()


@works(USE, "`vector_to_parameters(vector, plan.parameters())`", "")
def vector(setting: Setting) -> None:
    flat = nn.utils.parameters_to_vector(setting.plan.parameters())
    nn.utils.vector_to_parameters(flat.detach() * 0.5, setting.plan.parameters())


@works(USE, "a hook on a layer or the head", "")
def hooked(setting: Setting) -> None:
    seen = []
    for part in (setting.model.model.layers[0], setting.model.lm_head):
        part.register_forward_hook(lambda *_: seen.append(1))
    setting.steps(setting.plan.optimizer(lr=1e-2))
    assert len(seen) == 6


@works(USE, "`model.save_pretrained` in the middle of training", "It holds whole weights.")
def saved(setting: Setting) -> None:
    setting.steps(setting.plan.optimizer(lr=1e-2))
    setting.model.save_pretrained(setting.folder)
    again = AutoModelForCausalLM.from_pretrained(setting.folder)
    assert_equal(snapshot(again), snapshot(setting.model))


@works(USE, "`torch.save(model.state_dict())`", "")
def state_saved(setting: Setting) -> None:
    setting.steps(setting.plan.optimizer(lr=1e-2))
    torch.save(setting.model.state_dict(), setting.folder / "state.pt")
    assert_equal(torch.load(setting.folder / "state.pt"), snapshot(setting.model))


@refused(
    USE,
    "`torch.save(model)`, `pickle`",
    "the model is under a plan, and cannot be pickled",
    "Save weights or the update, or close the plan. `copy.deepcopy` works.",
)
def pickled(setting: Setting) -> Attempt:
    return lambda: pickle.dumps(setting.model)


@refused(USE, "a second plan on the same model", "model has an active plan already", "Close it.")
def second(setting: Setting) -> Attempt:
    return lambda: freeze(setting.model, setting.units)


def under_a_plan(situation: str, call: Any) -> None:
    refused(USE, situation, "close it first", "Scores and ablations need the whole weights.")(
        lambda setting: lambda: call(setting)
    )


under_a_plan("`ssah.attribute`", lambda s: ssah.attribute(s.model, [batch()]))
under_a_plan("`ssah.ablate`", lambda s: ssah.ablate(s.model, s.units))
under_a_plan("`ssah.prune`", lambda s: ssah.prune(s.model, s.units))
under_a_plan("`ssah.find_modules`", lambda s: find_modules(s.model))


@refused(
    USE,
    "`model.half()` or `.to(torch.bfloat16)`, then `plan.verify()`",
    "another dtype",
    "The frozen weights were rounded. Cast before the plan.",
)
def cast(setting: Setting) -> Attempt:
    setting.model.to(torch.bfloat16)
    return setting.plan.verify


@refused(
    USE,
    "second derivatives through a split weight",
    "marked with @once_differentiable",
    "Train without them.",
)
def second_derivatives(setting: Setting) -> Attempt:
    loss = loss_of(setting.model)
    parameters = list(setting.plan.parameters())
    return lambda: sum(
        g.sum() for g in torch.autograd.grad(loss, parameters, create_graph=True)
    ).backward()  # type: ignore[union-attr]


@works(
    USE,
    "`model.resize_token_embeddings` under the plan",
    "To load the update, resize the base in the same way first.",
)
def resized(setting: Setting) -> None:
    setting.model.resize_token_embeddings(136)
    setting.steps(setting.plan.optimizer(lr=1e-2))
    setting.plan.save_pretrained(setting.folder)
    base = tiny_models.build("llama")
    base.resize_token_embeddings(136)
    ssah.load_update(base, setting.folder)
    assert_equal(snapshot(base), snapshot(setting.model))
    setting.model.resize_token_embeddings(128)  # as many as the mask has


@refused(
    USE,
    "a hook on a projection of an FFN under the plan",
    "whose channels a plan has put into another order",
    "Hang it on before the plan, or after `plan.close()`.",
)
def hooked_inside(setting: Setting) -> Attempt:
    inside = setting.model.model.layers[0].mlp.up_proj
    return lambda: inside.register_forward_hook(lambda *_: None)


# ------------------------------------------------------------------------------ other memory


@works(OTHERS, "`Accelerator.prepare`, `accumulate`, `save_state`, `load_state`", "")
def accelerated(setting: Setting) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = setting.plan.optimizer(lr=1e-2)
    model, optimizer = accelerator.prepare(setting.model, optimizer)
    for seed in range(4):
        if seed == 2:
            accelerator.save_state(str(setting.folder / "state"))
            accelerator.load_state(str(setting.folder / "state"))
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, seed))
            optimizer.step()
            optimizer.zero_grad()


@refused(
    OTHERS,
    "`accelerate.cpu_offload(model)` under the plan",
    "a model under a plan cannot be offloaded",
    "Make the plan of a model that stays in memory.",
)
def offloaded(setting: Setting) -> Attempt:
    offloaded = cpu_offload(copy.deepcopy(setting.model), torch.device("cpu"))
    return lambda: loss_of(offloaded)


@refused(
    OTHERS,
    "a plan of a model that accelerate has offloaded (`device_map=`)",
    "must be a floating-point weight in memory",
    "Load it whole.",
)
def offloaded_before(setting: Setting) -> Attempt:
    away = cpu_offload(tiny_models.build("llama"), torch.device("cpu"))
    return lambda: freeze(away, setting.units)


# ---------------------------------------------------------------------------------- adapters


@refused(
    LORA,
    "LoRA on projections that a plan has split",
    "is split into trained and frozen units by an active plan",
    "Close the plan, and use `ssah.protect_adapter`.",
)
def lora_on_split(setting: Setting) -> Attempt:
    return lambda: get_peft_model(setting.model, LoraConfig(target_modules=["up_proj"]))
