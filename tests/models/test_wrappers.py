"""Models inside something else: each is refused in one sentence that says what to pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from plans import assert_equal, batch, draw, loss_of, snapshot
from tiny_models import build
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import ssah
from ssah.evaluation import answers, refusal_margin, utility_loss
from ssah.groups import UnitGroups


class WithValueHead(nn.Module):
    """As TRL's AutoModelForCausalLMWithValueHead."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(48, 1)

    def forward(self, **options: Any) -> Any:
        return self.pretrained_model(**options)


def peft_wrapped(model: PreTrainedModel) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


# Wrapper -> how it is made, and what its refusal says.
WRAPPERS: dict[str, tuple[Callable[[PreTrainedModel], nn.Module], str]] = {
    "torch.compile": (
        lambda model: torch.compile(model, backend="eager"),
        r"uncompiled model \(model\._orig_mod\), or compile in place",
    ),
    "DataParallel": (nn.DataParallel, r"DataParallel, which wraps a LlamaForCausalLM: .*\.module"),
    "DDP": (DistributedDataParallel, r"pass model\.module, and make a plan before"),
    "FSDP1": (
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        "FSDP1 is not supported.*fully_shard",
    ),
    "PEFT": (peft_wrapped, r"merge_and_unload\(\)"),
    "value head": (WithValueHead, r"WithValueHead, which wraps a LlamaForCausalLM: pass "),
    "two wrappers": (lambda model: nn.DataParallel(WithValueHead(model)), r"pass model\.module"),
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores, groups and an update of the model that the tests here begin with."""
    folder = tmp_path_factory.mktemp("results")
    model = build("llama")
    scores = [ssah.attribute(model, [batch(seed)], process_group=None) for seed in (0, 1)]
    scores[0].save(folder / "scores")
    ssah.classify(*scores, scu=0.1, ucu=0.1, ru=0.1).save(folder / "groups")
    with ssah.freeze(model, draw(model)) as plan:
        plan.save_pretrained(folder / "update")
    return folder


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_refused_by_name(name: str, results: Path) -> None:
    model = build("llama")
    units = draw(model)
    wrap, message = WRAPPERS[name]
    wrapped = wrap(model)
    before = snapshot(model)
    tokenizer = tiny_chat.tokenizer()
    attempts: dict[str, Callable[[], Any]] = {
        "attribute": lambda: ssah.attribute(wrapped, [batch()], process_group=None),
        "find_modules": lambda: ssah.find_modules(wrapped),
        "ablate": lambda: ssah.ablate(wrapped, units),
        "prune": lambda: ssah.prune(wrapped, units),
        "freeze": lambda: ssah.freeze(wrapped, units),
        "train_only": lambda: ssah.train_only(wrapped, units),
        "load_update": lambda: ssah.load_update(wrapped, results / "update"),
        "scores": lambda: ssah.Attribution.load(results / "scores", model=wrapped),
        "groups": lambda: UnitGroups.load(results / "groups", model=wrapped),
        "utility_loss": lambda: utility_loss(wrapped, [batch()]),
        "refusal_margin": lambda: refusal_margin(wrapped, tokenizer, ["a b"]),
        "answers": lambda: answers(wrapped, tokenizer, ["a b"], max_new_tokens=4),
        "probe": lambda: ssah.probe(wrapped, tokenizer, ["a b", "c d"]),
    }
    for attempt in attempts.values():
        with pytest.raises(TypeError, match=message):
            attempt()
    assert_equal(snapshot(model), before)


def test_what_wraps_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model is a Linear, must be a transformers\.PreTrained"):
        ssah.attribute(nn.Linear(2, 2), [batch()], process_group=None)
    with pytest.raises(TypeError, match=r"model is a str, must be a transformers\.PreTrained"):
        ssah.attribute("llama", [batch()], process_group=None)


def test_a_model_compiled_in_place_is_scored() -> None:
    model = build("llama")
    expected = ssah.attribute(model, [batch()], process_group=None).scores
    model.compile(backend="eager")
    found = ssah.attribute(model, [batch()], process_group=None).scores
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores)


def refused_by_all(model: PreTrainedModel, units: ssah.UnitSet, results: Path, match: str) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: ssah.attribute(model, [batch()], process_group=None),
        lambda: ssah.ablate(model, units),
        lambda: ssah.prune(model, units),
        lambda: ssah.freeze(model, units),
        lambda: ssah.train_only(model, units),
        lambda: ssah.load_update(model, results / "update"),
        lambda: utility_loss(model, [batch()]),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=match):
            attempt()


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("layers", [False, True])
def test_what_fsdp1_holds_is_refused(original: bool, layers: bool, results: Path) -> None:
    """The model inside the wrapper, of which FSDP1 has taken the weights."""
    model = build("llama")
    units = draw(model)
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": original}
    if layers:
        model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], **options)
    FullyShardedDataParallel(model, **options)
    refused_by_all(model, units, results, "sharded by FSDP1 .*fully_shard")


@pytest.mark.parametrize("empty", [False, True])
def test_what_deepspeed_partitions_is_refused(empty: bool, results: Path) -> None:
    model = build("llama")
    units = draw(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
        if empty:
            parameter.ds_tensor = parameter.data.flatten().clone()
            parameter.data = torch.empty(0)
    refused_by_all(model, units, results, "partitioned by DeepSpeed's ZeRO stage 3")


def test_data_parallel_replicas_of_a_planned_model_are_refused() -> None:
    model = build("llama")
    with ssah.freeze(model, draw(model)):
        loss_of(model)
        with pytest.raises(RuntimeError, match=r"under a plan.*CUDA_VISIBLE_DEVICES.*torchrun"):
            replicas(model)
    assert all(isinstance(each, nn.Linear) for each in replicas(model))


def replicas(model: nn.Module) -> list[nn.Module]:
    """What ``nn.DataParallel`` makes of every projection, before it copies any to a GPU."""
    parts: Iterator[nn.Module] = (part for part in model.modules() if isinstance(part, nn.Linear))
    return [part._replicate_for_data_parallel() for part in parts]


# ------------------------------------------------------------------------------ what stays on it


def trained_in_bf16(model: PreTrainedModel, folder: Path) -> None:
    """One step of a Trainer in mixed precision that moves no weight."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        learning_rate=0.0,
        report_to=[],
        use_cpu=True,
        bf16=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{key: value[0] for key, value in batch(seed).items()} for seed in range(4)]
    Trainer(model, arguments, train_dataset=rows).train()  # type: ignore[arg-type]


def measured(model: PreTrainedModel) -> dict[str, Any]:
    tokenizer = tiny_chat.tokenizer()
    return {
        "loss": utility_loss(model, [batch()]),
        "margin": refusal_margin(model, tokenizer, ["a b c", "d"]),
        "answers": answers(model, tokenizer, ["a b c"], max_new_tokens=8),
        "probe": ssah.probe(model, tokenizer, ["a b", "c d"], tokens=2).refusal_distances,
        "taylor": ssah.attribute(model, [batch()], metric="taylor", process_group=None).scores,
        "fisher": ssah.attribute(model, [batch()], metric="fisher", process_group=None).scores,
        "variance": ssah.attribute(model, [batch()], process_group=None).scores,
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, b[key]), key
        elif isinstance(value, dict):
            assert_same(value, b[key])
        else:
            assert value == b[key], key


def test_a_trainer_in_bf16_changes_no_measurement(tmp_path: Path) -> None:
    model = tiny_chat.model()
    before = measured(model)
    trained_in_bf16(model, tmp_path)
    patched = model.forward
    assert_same(before, measured(model))
    assert model.forward == patched  # as the Trainer left it


@pytest.mark.parametrize("metric", ["variance", "taylor"])
def test_the_callers_autocast_changes_no_measurement(metric: str) -> None:
    model = build("llama")
    before = utility_loss(model, [batch()])
    scores = ssah.attribute(model, [batch()], metric=metric, process_group=None).scores
    with torch.autocast("cpu", torch.bfloat16):
        assert utility_loss(model, [batch()]) == before
        assert_same(
            scores, ssah.attribute(model, [batch()], metric=metric, process_group=None).scores
        )


def test_a_forward_of_the_user_is_used() -> None:
    """Losses are of the model as it is, whatever was put on it."""
    model = build("llama")
    before, own = utility_loss(model, [batch()]), model.forward

    def colder(*args: Any, **options: Any) -> Any:
        out = own(*args, **options)
        out.logits = out.logits / 2
        return out

    model.forward = colder
    assert utility_loss(model, [batch()]) != before
    assert model.forward is colder


def test_autocast_that_is_kept_elsewhere_is_noticed(tmp_path: Path) -> None:
    """As by a release of accelerate that gives the model's own forward another name."""
    model = tiny_chat.model()
    trained_in_bf16(model, tmp_path)
    del model._original_forward
    with pytest.raises(ImportError, match=r"accelerate .* has no _original_forward"):
        utility_loss(model, [batch()])
