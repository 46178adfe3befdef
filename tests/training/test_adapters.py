"""Adapters that leave chosen units as they are, judged by an independent mask, and ``verify``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bnb_layouts
import pytest
import tiny_chat
import tiny_models
import torch
from plans import batch, draw, masks, snapshot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from typer.testing import CliRunner

import ssah
from ssah.cli import app
from ssah.data import make_loader
from ssah.models import load_model
from ssah.units import UnitSet

peft = pytest.importorskip("peft")

SETS = ("safety", "utility")
FAMILIES = ("llama", "llama_tied", "qwen2", "gpt2", "phi3")


def lora(model: PreTrainedModel, **options: Any) -> nn.Module:
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def train(model: nn.Module, steps: int = 4, lr: float = 1e-2) -> list[float]:
    """AdamW with decay on whatever trains; the losses before each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step % 2)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def moved(before: dict[str, Tensor], after: nn.Module, mask: dict[str, Tensor]) -> tuple[int, int]:
    """How many elements differ of those that must stay, and of those that may move."""
    stay = move = 0
    for name, parameter in after.named_parameters():
        differs = parameter.detach() != before[name]
        stay += int((differs & (mask[name] == 0)).sum())
        move += int((differs & (mask[name] != 0)).sum())
    return stay, move


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["freeze", "only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_of_protected_units_are_those_before(family, dtype, mode) -> None:
    model = tiny_models.build(family, dtype=dtype)
    units = draw(model, 0.2)
    before, mask = parameters(model), masks(model, units, mode)
    base = copy.deepcopy(model)
    options = {"use_rslora": True} if mode == "only" else {}
    adapted = lora(model, **options)
    protected = ssah.protect_adapter(adapted, units, only=mode == "only")
    losses = train(adapted)
    assert losses[-1] < losses[0]
    protected.verify()
    ssah.verify(adapted, base, units, only=mode == "only")
    merged = adapted.merge_and_unload()
    stay, move = moved(before, merged, mask)
    assert stay == 0
    assert move > 0
    ssah.verify(merged, base, units, only=mode == "only")


def test_without_protection_the_same_units_move() -> None:
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    base = copy.deepcopy(model)
    adapted = lora(model)
    train(adapted)
    with pytest.raises(RuntimeError, match=r"entries of .*down_proj\.weight \(\d+ of \d+\)"):
        ssah.verify(adapted, base, units)
    with pytest.raises(RuntimeError, match=r"and \d+ more are not those of the base model"):
        ssah.verify(adapted.merge_and_unload(), base, units)


def test_nothing_changes_when_an_adapter_is_protected() -> None:
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    adapted = lora(model).eval()
    with torch.no_grad():
        before = adapted(**batch()).logits
        ssah.protect_adapter(adapted, units)
        assert torch.equal(adapted(**batch()).logits, before)


def test_only_the_units_own_projections_train() -> None:
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    adapted = lora(model)
    protected = ssah.protect_adapter(adapted, units, only=True)
    trains = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert not any("q_proj" in name or "k_proj" in name for name in trains)
    assert any("o_proj" in name for name in trains)
    protected.verify()
    queries = next(p for name, p in adapted.named_parameters() if "q_proj.lora_B" in name)
    with torch.no_grad():
        queries.fill_(0.1)  # as loading another adapter does
    with pytest.raises(RuntimeError, match=r"the adapter of \S*q_proj\.weight writes"):
        protected.verify()
    protected.remove()
    assert any("q_proj" in n for n, p in adapted.named_parameters() if p.requires_grad)


def test_a_removed_protection_protects_no_more() -> None:
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    adapted = lora(model)
    protected = ssah.protect_adapter(adapted, units)
    protected.remove()
    train(adapted)
    with pytest.raises(RuntimeError, match=r"the adapter of .* and .* more writes entries"):
        protected.verify()


def test_miss_on_projections_into_units() -> None:
    model = tiny_models.build("llama")
    units = UnitSet(
        {name: index for name, index in draw(model, 0.2).items() if "mlp" in name},
        draw(model, 0.2).sizes,
    )
    before, mask = parameters(model), masks(model, units, "freeze")
    targets = ["gate_proj", "up_proj", "q_proj"]
    config = peft.MissConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    ssah.protect_adapter(adapted, units)
    train(adapted)
    stay, move = moved(before, adapted.merge_and_unload(), mask)
    assert (stay, move > 0) == (0, True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "couples rows and columns .* use plain LoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes protected units already"),
    "bias": ({"lora_bias": True}, "lora_bias=True"),
    "saved whole": ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, "modules_to_save"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_couples_units_is_refused_and_nothing_changed(case) -> None:
    options, message = REFUSED[case]
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    adapted = lora(model, **options)
    before = snapshot(adapted)
    flags = [p.requires_grad for p in adapted.parameters()]
    with pytest.raises(ValueError, match=message):
        ssah.protect_adapter(adapted, units)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert [p.requires_grad for p in adapted.parameters()] == flags


def test_miss_out_of_units_is_refused() -> None:
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    config = peft.MissConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="MiSS on a projection out of units"):
        ssah.protect_adapter(peft.get_peft_model(model, config), units)


def test_other_adapters_and_models_are_refused() -> None:
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    with pytest.raises(TypeError, match=r"must be a peft\.PeftModel"):
        ssah.protect_adapter(model, units)
    other = draw(tiny_models.build("gpt2"), 0.2)
    with pytest.raises(ValueError, match="model"):
        ssah.protect_adapter(lora(copy.deepcopy(model)), other)
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"]
    )
    with pytest.raises(ValueError, match="must be LoRA or MiSS of a linear projection"):
        ssah.protect_adapter(peft.get_peft_model(copy.deepcopy(model), config), units)
    merged = lora(copy.deepcopy(model))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weight"):
        ssah.protect_adapter(merged, units)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("mode", ["freeze", "only"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_adapters_of_experts_keep_their_units(family, mode) -> None:
    """GPT-OSS keeps an expert as [in, out], and gate and up in turn."""
    model = tiny_models.build(family)
    units = draw(model, 0.2)
    before, mask = parameters(model), masks(model, units, mode)
    targets = ["q_proj", "v_proj", "o_proj"]
    adapted = lora(model, target_modules=targets, target_parameters=EXPERTS)
    protected = ssah.protect_adapter(adapted, units, only=mode == "only")
    train(adapted)
    protected.verify()
    base = tiny_models.build(family)
    ssah.verify(adapted, base, units, only=mode == "only")
    experts = next(m for n, m in adapted.named_modules() if n.endswith("experts"))
    tensors = [experts.lora_A["default"].weight, experts.lora_B["default"].weight]
    kept = [each.detach().clone() for each in tensors]
    with torch.no_grad():
        for each in tensors:  # which of them protects depends on the release of peft
            each.add_(1e-3)
    with pytest.raises(RuntimeError, match=r"experts.* writes entries of protected units"):
        protected.verify()
    with pytest.raises(RuntimeError, match=r"experts\.\w+ \(\d+ of \d+\)"):
        ssah.verify(adapted, base, units, only=mode == "only")
    with torch.no_grad():
        for each, before_it in zip(tensors, kept, strict=True):
            each.copy_(before_it)
    stay, move = moved(before, adapted.merge_and_unload(), mask)
    assert (stay, move > 0) == (0, True)
    still = {n for n, p in adapted.get_base_model().named_parameters() if torch.equal(p, before[n])}
    assert not any("experts" in name and "bias" not in name for name in still)


def test_four_bit_base_adds_exactly_zero_to_protected_units(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)

    # bitsandbytes' layout for AVX512-BF16 takes no module of fewer than 32 outputs.
    with bnb_layouts.processor(lays_out=False):
        plain = tiny_models.build("llama")
        units = draw(plain, 0.2)
        mask = masks(plain, units, "freeze")
        plain.save_pretrained(tmp_path)
        packed, base = (
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit)
            for _ in range(2)
        )
        adapted = lora(packed)
        ssah.protect_adapter(adapted, units)
        train(adapted)
        checked = 0
        for name, module in adapted.get_base_model().named_modules():
            if hasattr(module, "lora_A") and "lm_head" not in name:
                delta = module.get_delta_weight("default")
                kept = mask[f"{name}.weight"] == 0
                assert bool((delta[kept] == 0).all()), name
                checked += int(kept.any())
        assert checked > 0
        ssah.verify(adapted, base, units)


# ------------------------------------------------------------------------------------- trainers


def test_a_saved_adapter_loads_without_this_library(tmp_path) -> None:
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    base = copy.deepcopy(model)
    adapted = lora(model)
    ssah.protect_adapter(adapted, units)
    train(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ssah.verify(loaded, base, units)
    logits = [m.eval()(**batch()).logits for m in (loaded, adapted)]
    assert torch.equal(*logits)


def test_the_command_verifies_merged_models_and_adapters(tmp_path) -> None:
    tiny_chat.save(tmp_path / "base")
    base, tokenizer = load_model(str(tmp_path / "base"))
    loaders = [make_loader(f"builtin:{name}", tokenizer) for name in SETS]
    groups = ssah.classify(*(ssah.attribute(base, each) for each in loaders), scu=0.1, ucu=0, ru=0)
    groups.save(tmp_path / "groups")
    adapted = lora(base)
    ssah.protect_adapter(adapted, groups["scu"])
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    words = ["--base", str(tmp_path / "base"), "--groups", str(tmp_path / "groups")]
    for folder in ("adapter", "merged"):
        run = ["verify", str(tmp_path / folder), *words]
        kept = CliRunner().invoke(app, [*run, "--units", "scu", "--json"])
        assert kept.exit_code == 0, kept.output
        assert json.loads(kept.stdout)["units"] == len(groups["scu"])
        moved = CliRunner().invoke(app, [*run, "--units", "cu"])
        assert moved.exit_code == 1
        assert "are not those of the base model" in moved.stderr
    with pytest.raises(TypeError, match=r"base is a .*must be a folder or hub id"):
        ssah.verify(tmp_path / "adapter", base, groups["scu"])


def test_the_callback_protects_what_a_trainer_makes(tmp_path) -> None:
    """As with ``peft_config=``: the adapter is there when training begins, and not before."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    units = draw(model, 0.2)
    base = copy.deepcopy(model)
    args = trl.SFTConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_steps=2,
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"prompt": f"Say {n}", "completion": f" {n}{n}"} for n in range(8)])
    callback = ssah.training.AdapterCallback(units)
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert callback.protected is not None
    ssah.verify(trainer.model, base, units)
    assert any(bool(p.ne(0).any()) for n, p in trainer.model.named_parameters() if "lora_B" in n)


# --------------------------------------------------------------------------------------- verify


@pytest.fixture
def folders(tmp_path) -> tuple[PreTrainedModel, UnitSet, Path, Path]:
    model = tiny_models.build("llama")
    units = draw(model, 0.2)
    model.save_pretrained(tmp_path / "base")
    changed = copy.deepcopy(model)
    mask = masks(model, units, "freeze")
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.add_(mask[name] * 1e-3)
    changed.save_pretrained(tmp_path / "tuned")
    return changed, units, tmp_path / "base", tmp_path / "tuned"


def test_folders_are_compared_layer_by_layer(folders, monkeypatch) -> None:
    changed, units, base, tuned = folders
    monkeypatch.setattr("ssah.training.verifying.load_weights", None)  # a whole model is not loaded
    ssah.verify(tuned, base, units)
    name = "model.layers.1.mlp.down_proj.weight"
    column = int(units["model.layers.1.mlp.down_proj"][0])
    with torch.no_grad():
        weight = changed.get_parameter(name)
        weight[3, column] = torch.nextafter(weight[3, column], torch.tensor(9.0))
    changed.save_pretrained(tuned)
    with pytest.raises(RuntimeError, match=rf"{name} \(1 of {len(units[name[:-7]])}\) are not"):
        ssah.verify(tuned, base, units)


def test_a_model_and_a_folder(folders) -> None:
    changed, units, base, _ = folders
    ssah.verify(changed, base, units)
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight"):
        ssah.verify(changed, base, units, only=True)
    same = tiny_models.build("llama")
    with torch.no_grad():
        same.model.layers[0].mlp.down_proj.weight[:, units["model.layers.0.mlp.down_proj"]] += 1
    ssah.verify(same, base, units, only=True)


def test_models_that_cannot_be_compared_are_refused(folders) -> None:
    changed, units, base, _ = folders
    with pytest.raises(ValueError, match=r"is torch\.bfloat16 .* and torch\.float32"):
        ssah.verify(copy.deepcopy(changed).bfloat16(), base, units)
    with pytest.raises(ValueError, match="units"):
        ssah.verify(tiny_models.build("gpt2"), tiny_models.build("gpt2"), units)


def test_a_plan_ends_where_verify_agrees() -> None:
    model = tiny_models.build("llama")
    base, units = copy.deepcopy(model), draw(model, 0.2)
    with ssah.freeze(model, units) as plan:
        optimizer = plan.optimizer(lr=1e-2)
        model(**batch()).loss.backward()
        optimizer.step()
    ssah.verify(model, base, units)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[
            int(units["model.layers.0.mlp.down_proj"][0]), 2
        ] += 1
    with pytest.raises(RuntimeError, match=r"up_proj\.weight \(1 of"):
        ssah.verify(model, base, units)


def test_a_model_under_a_plan_is_no_proof() -> None:
    """Its weights are split: what is not found must not count as equal."""
    model = tiny_models.build("llama")
    base, units = copy.deepcopy(model), draw(model, 0.2)
    with ssah.freeze(base, units), pytest.raises(ValueError, match=r"base has no parameter .*plan"):
        ssah.verify(model, base, units)
    with (
        ssah.freeze(model, units),
        pytest.raises(ValueError, match=r"model has no parameter .*plan"),
    ):
        ssah.verify(model, base, units)


def test_what_an_adapter_trains_whole_is_compared() -> None:
    """Of a module in ``modules_to_save``, the copy that the forward pass uses counts."""
    model = tiny_models.build("llama")
    base, units = copy.deepcopy(model), draw(model, 0.2)
    adapted = lora(model, target_modules=["q_proj"], modules_to_save=["mlp"])
    ssah.verify(adapted, base, units)
    train(adapted)
    with pytest.raises(RuntimeError, match=r"mlp\.\w+\.weight"):
        ssah.verify(adapted, base, units)
