"""Trainers that read weights by name: vLLM's sync, ``sync_ref_model``, BEMA.

vLLM is not installed. What TRL would push to it is caught at the place of the engine, by TRL's own
code, and loaded into a model without a plan.
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import tiny_models
import torch
import trl_trainers
from plans import assert_equal, batch, draw, make, masks, snapshot
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

import ssah
from ssah.compat import LibraryError
from ssah.training import AdapterCallback, PlanCallback, plan_of, prepare_trainer

trl = pytest.importorskip("trl")


class Engine:
    """What TRL sees of vLLM, its client and its engine: a model that is given weights by name."""

    def __init__(self, source: PreTrainedModel) -> None:
        self.source = source
        self.own = tiny_models.build("llama", seed=5)
        self.given: list[str] = []
        self.syncs = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("llm_engine", "model_executor", "driver_worker", "model_runner", "model"):
            return self
        raise AttributeError(name)

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def load_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self.own.named_parameters())
        for name, value in pairs:
            assert parameters[name].shape == value.shape, name  # unknown names are a KeyError
            parameters[name].data.copy_(value)
            self.given.append(name)

    def update_named_params(self, about: list[Any], pairs: Iterable[tuple[str, Tensor]]) -> None:
        kept = [(name, value.clone()) for name, value in pairs]
        assert [(n, list(v.shape)) for n, v in kept] == [(n, shape) for n, _, shape in about]
        self.load_weights(kept)

    def update_named_param(self, name: str, value: Tensor) -> None:  # of earlier releases
        self.load_weights([(name, value)])

    def reset_prefix_cache(self) -> None:
        """The end of a sync: the engine has the weights of now, each given once."""
        self.syncs += 1
        assert self.given == [name for name, _ in self.own.named_parameters()]
        self.given.clear()
        if plan_of(self.source) is not None:
            assert_equal(snapshot(self.own), snapshot(self.source))


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's object for vLLM, which draws answers in the place of an engine."""
    generation = importlib.import_module("trl.generation.vllm_generation").VLLMGeneration

    def begin(self: Any) -> None:
        self.llm = self.vllm_client = Engine(self.model)

    def generate(self: Any, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        answers = torch.randint(3, 100, (len(prompts), 4)).tolist()
        return prompts, answers, [[[-1.0]] * 4 for _ in answers], None

    monkeypatch.setattr(generation, "_init_vllm", begin)
    monkeypatch.setattr(generation, "generate", generate)


@pytest.mark.usefixtures("without_vllm")
@pytest.mark.parametrize(
    ("kind", "mode", "choice"),
    [
        ("grpo", "colocate", "freeze"),
        ("grpo", "server", "train_only"),
        pytest.param("rloo", "colocate", "train_only", marks=pytest.mark.exhaustive),
    ],
)
def test_vllm_is_given_whole_weights_by_their_names(
    kind: str, mode: str, choice: str, tmp_path: Path
) -> None:
    model = trl_trainers.build_model(kind)
    units, before = draw(model), snapshot(model)
    trains = masks(model, units, choice)
    plan = make(model, choice, units)
    trainer = trl_trainers.make(
        kind,
        model,
        tmp_path,
        optimizers=plan.optimizers,
        use_vllm=True,
        vllm_mode=mode,
        max_steps=3,
    )
    prepare_trainer(plan, trainer)
    trainer.train()
    assert {name for name, _ in plan.named_parameters()} <= {n for n, _ in model.named_parameters()}
    engine = trainer.vllm_generation.llm
    assert engine.syncs == 3
    trainer.vllm_generation.sync_weights()
    found = snapshot(engine.own)
    for name, mask in trains.items():
        assert found[name][mask == 0].equal(before[name][mask == 0]), name
        assert found[name].equal(before[name]) != bool(mask.any()), name
    plan.close()
    trainer.vllm_generation.sync_weights()  # as it did without a plan


@pytest.mark.exhaustive  # TRL merges the adapter for vLLM; nothing of this library is in between
@pytest.mark.usefixtures("without_vllm")
def test_vllm_is_given_protected_units_as_they_were(tmp_path: Path) -> None:
    model = trl_trainers.build_model("grpo")
    units, before = draw(model, 0.2), snapshot(model)
    kept = masks(model, units, "train_only")  # 1 where a unit owns the entry
    projections = ["gate_proj", "up_proj", "down_proj", "v_proj", "o_proj"]
    trainer = trl_trainers.make(
        "grpo",
        model,
        tmp_path,
        given={
            "callbacks": [AdapterCallback(units)],
            "peft_config": peft.LoraConfig(r=4, target_modules=projections),
        },
        use_vllm=True,
        vllm_mode="colocate",
        max_steps=3,
    )
    trainer.train()
    trainer.vllm_generation.sync_weights()
    found = snapshot(trainer.vllm_generation.llm.own)
    moved = 0
    for name, mask in kept.items():
        assert found[name][mask == 1].equal(before[name][mask == 1]), name
        moved += int(found[name].ne(before[name]).sum())
    assert moved


def test_online_dpo_gives_vllm_whole_weights(tmp_path: Path) -> None:
    model = trl_trainers.build_model("online_dpo")
    plan = ssah.freeze(model, draw(model))
    trainer = trl_trainers.make("online_dpo", model, tmp_path, optimizers=plan.optimizers)
    trainer.train()
    trainer.args.use_vllm, trainer.vllm_mode, trainer.llm = True, "colocate", Engine(model)
    prepare_trainer(plan, trainer)
    trainer._move_model_to_vllm()
    assert trainer.llm.syncs == 1


# ------------------------------------------------------------------------------ reference models


@pytest.mark.parametrize(
    "kind",
    ["dpo", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("grpo", "rloo"))],
)
def test_a_reference_without_a_plan_is_brought_up_to_date(kind: str, tmp_path: Path) -> None:
    model = trl_trainers.build_model(kind)
    units, before = draw(model), snapshot(model)
    trains = masks(model, units, "freeze")
    plan = ssah.freeze(model, units)
    trainer = trl_trainers.make(
        kind,
        model,
        tmp_path,
        optimizers=plan.optimizers,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        beta=0.1,  # at zero, GRPO has no reference
    )
    prepare_trainer(plan, trainer)
    trainer.train()
    reference, now = trainer.accelerator.unwrap_model(trainer.ref_model), snapshot(model)
    assert_equal(snapshot(reference), now)
    for name, mask in trains.items():
        assert now[name][mask == 0].equal(before[name][mask == 0]), name
    assert not now["lm_head.weight"].equal(before["lm_head.weight"])


def test_a_reference_under_the_same_plan_is_paired_slice_by_slice(tmp_path: Path) -> None:
    model = trl_trainers.build_model("dpo")
    plan = ssah.freeze(model, draw(model))
    trainer = trl_trainers.make(
        "dpo",
        model,
        tmp_path,
        optimizers=plan.optimizers,
        given={"ref_model": copy.deepcopy(model)},
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
    )
    prepare_trainer(plan, trainer)
    trainer.train()
    assert_equal(snapshot(trainer.accelerator.unwrap_model(trainer.ref_model)), snapshot(model))


def test_a_trainer_that_was_not_prepared_is_refused_before_its_first_step(tmp_path: Path) -> None:
    model = trl_trainers.build_model("dpo")
    before = snapshot(model)
    plan = ssah.freeze(model, draw(model))
    trainer = trl_trainers.make(
        "dpo", model, tmp_path, optimizers=plan.optimizers, sync_ref_model=True
    )
    with pytest.raises(RuntimeError, match=r"args\.sync_ref_model is True.*prepare_trainer\(plan"):
        trainer.train()
    assert_equal(snapshot(model), before)


# ------------------------------------------------------------------------------------------ BEMA


class Recorder(TrainerCallback):
    """The weights after each step, in float64; those before the first as well."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def _record(self, model: PreTrainedModel) -> None:
        self.weights.append({name: v.double() for name, v in model.state_dict().items()})

    def on_train_begin(self, *_: Any, **options: Any) -> None:
        self._record(options["model"])

    def on_step_end(self, *_: Any, **options: Any) -> None:
        self._record(options["model"])


def bema(weights: list[dict[str, Tensor]], every: int) -> dict[str, Tensor]:
    """Equation of Block & Zhang (arXiv 2508.00180) with TRL's defaults, by loops in float64."""
    first = weights[0]
    ema = dict(first)
    found = dict(first)
    for step, now in enumerate(weights):
        if step == 0 or step % every:
            continue
        alpha, beta = (10 + step) ** -0.2, (10 + step) ** -0.5
        for name in first:
            ema[name] = (1 - beta) * ema[name] + beta * now[name]
            found[name] = ema[name] + alpha * (now[name] - first[name])
    return found


@pytest.mark.parametrize("choice", ["freeze", "train_only"])
def test_bema_averages_what_trains_and_keeps_the_rest(choice: str, tmp_path: Path) -> None:
    model = trl_trainers.build_model("sft")
    units, before = draw(model), snapshot(model)
    trains = masks(model, units, choice)
    plan = make(model, choice, units)
    average, recorder = trl.BEMACallback(update_freq=2), Recorder()
    trainer = trl_trainers.make(
        "sft",
        model,
        tmp_path,
        optimizers=plan.optimizers,
        given={"callbacks": [recorder, PlanCallback(plan), average]},
        max_steps=5,
    )
    prepare_trainer(plan, trainer)
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema")
    found, expected = snapshot(saved), bema(recorder.weights, 2)
    for name, mask in trains.items():
        still = mask == 0
        assert found[name][still].equal(before[name][still]), name
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)
        assert found[name].equal(before[name]) != bool(mask.any()), name
    assert plan_of(average.running_model) is None  # an ordinary model as well
    torch.testing.assert_close(average.running_model(**batch()).logits, saved(**batch()).logits)
    assert plan.closed


# --------------------------------------------------------------------------------------- refusals


def other_model(trainer: Any) -> str:
    trainer.model = tiny_models.build("llama")
    return "another LlamaForCausalLM than the plan"


def adapters(trainer: Any) -> str:
    trainer.model = peft.get_peft_model(trainer.model, peft.LoraConfig(target_modules=["q_proj"]))
    return "has put adapters .*AdapterCallback"


def several_gpus(trainer: Any) -> str:
    trainer.args.n_gpu = 2
    return "copy the model to 2 GPUs .*CUDA_VISIBLE_DEVICES=0"


def fsdp(trainer: Any) -> str:
    trainer.is_fsdp_enabled = True
    return "shard the model with FSDP after its plan"


def deepspeed(trainer: Any) -> str:
    trainer.is_deepspeed_enabled = True
    return "shard the model with DeepSpeed after its plan"


def another_engine(trainer: Any) -> str:
    trainer.args.use_vllm = True
    return "a DPOTrainer, which sends weights to vLLM in a way that is not known here"


def another_process(trainer: Any) -> str:
    kind = type("AsyncGRPOTrainer", (type(trainer),), {"__module__": "trl.experimental.async_grpo"})
    trainer.__class__ = kind
    return "an? AsyncGRPOTrainer, which sends weights to vLLM in a way that is not known here"


def another_reference(trainer: Any) -> str:
    trainer.add_callback(trl.SyncRefModelCallback(tiny_models.build("llama_tied"), None))
    return r"ref_model has nothing for 'lm_head\.weight', must have \(128, 48\)"


REFUSALS = [other_model, adapters, several_gpus, fsdp, deepspeed, another_engine, another_process]
REFUSALS.append(another_reference)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = trl_trainers.build_model("dpo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl_trainers.make("dpo", model, tmp_path_factory.mktemp("dpo"))


@pytest.mark.parametrize("change", REFUSALS)
def test_what_cannot_be_prepared_is_refused_and_nothing_changed(change: Any, dpo: Any) -> None:
    model = tiny_models.build("llama")
    plan = ssah.freeze(model, draw(model))
    trainer = copy.copy(dpo)
    trainer.model, trainer.args = model, SimpleNamespace(n_gpu=1, use_vllm=False)
    trainer.callback_handler = copy.copy(dpo.callback_handler)
    trainer.callback_handler.callbacks = [trl.BEMACallback()]
    average = trainer.callback_handler.callbacks[0]
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(TypeError, match="plan is a DPOTrainer, must be what"):
        prepare_trainer(trainer, plan)
    words = change(trainer)
    with pytest.raises(ValueError, match=words):
        prepare_trainer(plan, trainer)
    assert "on_train_begin" not in vars(average)
    found = [name.replace("base_layer.", "") for name, _ in model.named_parameters()]
    assert [name for name in found if "lora" not in name] == names


def test_averages_of_a_sharded_model_are_refused(dpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ssah.freeze(dpo.model, draw(dpo.model))
    monkeypatch.setattr(plan._installed, "sharded", True)
    prepare_trainer(plan, dpo)  # what reads names finds those from before
    monkeypatch.setattr(dpo.callback_handler, "callbacks", [trl.BEMACallback()])
    with pytest.raises(ValueError, match="must not do so while the model is sharded"):
        prepare_trainer(plan, dpo)
    monkeypatch.undo()
    plan.close()


def test_a_release_of_trl_without_its_callbacks_is_named(
    dpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ssah.freeze(dpo.model, draw(dpo.model))
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    with pytest.raises(LibraryError, match=r"has no trl\.SyncRefModelCallback.*'trl>="):
        prepare_trainer(plan, dpo)
    plan.close()


def test_a_closed_plan_prepares_nothing(dpo: Any) -> None:
    model = tiny_models.build("llama")
    plan = ssah.freeze(model, draw(model))
    plan.close()
    with pytest.raises(RuntimeError, match="the plan is closed"):
        prepare_trainer(plan, dpo)
