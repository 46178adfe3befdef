"""Updates and ablations as LoRA adapters, loaded by PEFT alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, draw, loss_of, make, masks, snapshot
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import ssah
from ssah.training import UpdatePlan
from ssah.units import UnitSet, find_modules

peft = pytest.importorskip("peft")

FAMILIES = ("llama", "gpt2", "qwen2")  # shared key/value heads, Conv1D with biases, a bias of V


def chosen(model: PreTrainedModel, fraction: float = 0.15) -> UnitSet:
    """Units at random, and in attention pairs that share a row of V, so that rows train there."""
    units = draw(model, fraction)
    groups = {}
    for name, module in find_modules(model).items():
        rows = module.inputs[0].index
        own = units[name].tolist()
        wanted = [int(rows[unit]) for unit in own[:3]] if module.kind == "attention" else None
        groups[name] = units[name] if wanted is None else torch.isin(rows, torch.tensor(wanted))
    return UnitSet(
        {n: g.nonzero()[:, 0] if g.dtype == torch.bool else g for n, g in groups.items()},
        units.sizes,
    )


def trained(model: PreTrainedModel) -> UpdatePlan:
    """A plan under which three steps were made."""
    plan = make(model, "train_only", chosen(model))
    plan.keep_originals()
    optimizer = plan.optimizer(lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return plan


def adapted(base: PreTrainedModel, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**batch()).logits


def merged(model: Any) -> dict[str, Tensor]:
    return snapshot(model.merge_and_unload())


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_the_updated_model_does(family: str, tmp_path: Path) -> None:
    model, base = (tiny_models.build(family) for _ in range(2))
    plan = trained(model)
    plan.save_pretrained(tmp_path / "update")
    made = ssah.export_lora(plan, tmp_path / "plan")
    units = plan.units
    plan.close()
    assert ssah.export_lora(tmp_path / "update", tmp_path / "update_too", base=base) == made
    assert ssah.export_lora(model, tmp_path / "model", base=base) == made
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("plan", "update_too")]
    assert_equal(*files)

    expected = logits(model)
    assert not torch.allclose(logits(base), expected, rtol=1e-3)
    found = logits(adapted(base, tmp_path / "model"))
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    # Ranks, from the units alone: k columns of B, and the rows of V that only trained units read.
    trains = masks(base, units, "train_only")
    for name, module in find_modules(base).items():
        assert made.ranks[module.output.param.removesuffix(".weight")] == len(units[name])
        for owned in module.inputs:
            mask = trains[owned.param].movedim(owned.dim, 0)
            rank = int(mask.reshape(len(mask), -1).any(1).sum())
            if owned.param.endswith(".weight"):
                assert made.ranks[owned.param.removesuffix(".weight")] == rank > 0
    assert bool(made.biases) == (family != "llama")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_the_tuned_ones_as_far_as_is_said(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, base = (tiny_models.build(family, dtype=dtype) for _ in range(2))
    trained(model).close()
    made = ssah.export_lora(model, tmp_path / "adapter", base=base)
    now, wanted, before = (
        merged(adapted(base, tmp_path / "adapter")),
        snapshot(model),
        snapshot(base),
    )
    differ = {name: now[name] != wanted[name] for name in wanted if "lm_head" not in name}
    assert sum(int(each.sum()) for each in differ.values()) == made.inexact
    changed = sum(int((wanted[n] != before[n]).sum()) for n in differ)
    assert made.changed == changed > made.inexact
    error = max(float((now[n].double() - wanted[n].double()).abs().max()) for n in differ)
    assert error == made.error < 1e-6
    assert (made.inexact == 0) == (dtype == torch.bfloat16)  # float32 has no wider sum here
    said = "every changed element" if made.inexact == 0 else f"{made.inexact:,} of {changed:,}"
    assert said in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_ablation_is_the_ablation_bit_for_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny_models.build(family, dtype=dtype)
    before, units = snapshot(base), draw(base, 0.1)
    made = ssah.export_lora(units, tmp_path / "adapter", base=base)
    assert_equal(snapshot(base), before)
    assert (made.inexact, made.error) == (0, 0.0)
    assert made.ranks == {name: len(units[name]) for name in made.ranks}
    model = adapted(base, tmp_path / "adapter")
    zeroed = copy.deepcopy(base)
    for name, module in find_modules(zeroed).items():  # what enters B, channel by channel
        module.down.register_forward_pre_hook(
            lambda _, args, own=units[name]: (args[0].index_fill(-1, own, 0), *args[1:])
        )
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-5, atol=1e-5)
    with ssah.ablate(base, units):
        expected = logits(base)
    assert torch.equal(expected, logits(zeroed))
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_a_change_of_large_weights_to_small_ones_is_counted_as_inexact(tmp_path: Path) -> None:
    """In float32 no number added to 1024.7 gives 0.1: sums there are 2**-13 apart or exact."""
    model, base = (tiny_models.build("llama") for _ in range(2))
    large, small = torch.tensor(1024.7), torch.tensor(0.1)
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[:, 3] = large
        model.model.layers[0].mlp.down_proj.weight[:, 3] = small
        model.model.layers[0].mlp.down_proj.weight[5, 3] = 1025.0  # near: exact
    made = ssah.export_lora(model, tmp_path / "adapter", base=base)
    assert (made.changed, made.inexact) == (48, 47)
    assert made.error == abs(float(large + (small - large)) - float(small)) > 0
    assert made.ranks == {"model.layers.0.mlp.down_proj": 1}


def test_the_configuration_is_what_peft_and_vllm_read(tmp_path: Path) -> None:
    model, base = (tiny_models.build("llama") for _ in range(2))
    base.config.name_or_path = "/home/someone/models/secret"
    trained(model).close()
    made = ssah.export_lora(model, tmp_path / "adapter", base=base)
    folder = tmp_path / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not any(b"/home" in path.read_bytes() for path in folder.iterdir())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == made.base_model == "secret"
    # vLLM has one scale for all modules, alpha / r, and takes ranks from the tensors.
    assert config["r"] == config["lora_alpha"] == made.rank
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, rank in made.ranks.items():
        assert len(tensors[f"base_model.model.{name}.lora_A.weight"]) == rank
        assert config["rank_pattern"].get(name, made.rank) == rank
    layers = [m for m in adapted(base, folder).modules() if hasattr(m, "lora_A")]
    assert {m.scaling["default"] for m in layers} == {1.0}
    assert len(layers) == len(made.ranks)
    text = (folder / "README.md").read_text()
    own = [rank for name, rank in made.ranks.items() if name.endswith("mlp.down_proj")]
    assert f"| `model.layers.*.mlp.down_proj` | 2 | {min(own)} to {max(own)} |" in text
    assert f"--max-lora-rank {made.served_rank}" in text
    assert made.served_rank is not None
    assert made.served_rank >= made.rank


def test_what_is_no_adapter_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model, base = (tiny_models.build("llama") for _ in range(2))
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"nothing changed"):
        ssah.export_lora(model, folder, base=base)
    with torch.no_grad():
        model.model.norm.weight += 1
        model.model.embed_tokens.weight[3] += 1
    with pytest.raises(ValueError, match=r"embed_tokens\.weight \(Embedding\).*norm\.weight"):
        ssah.export_lora(model, folder, base=base)
    wrong: Any = {}
    with pytest.raises(TypeError, match=r"change is a dict, must be a plan, a UnitSet, a model"):
        ssah.export_lora(wrong, folder, base=base)
    with pytest.raises(TypeError, match=r"base is None, must be the model before"):
        ssah.export_lora(model, folder)
    with pytest.raises(ValueError, match=r"in the tuned model and .* in base"):
        ssah.export_lora(tiny_models.build("gpt2"), folder, base=base)
    with pytest.raises(ValueError, match=r"bfloat16 .* in the tuned model and torch\.float32"):
        ssah.export_lora(copy.deepcopy(base).bfloat16(), folder, base=base)
    units = draw(base, 0.3)
    with pytest.raises(ValueError, match=r"must be at most max_rank=4 .* train fewer units"):
        ssah.export_lora(units, folder, base=base, max_rank=4)
    with pytest.raises(ValueError, match=r"max_rank is 0"):
        ssah.export_lora(units, folder, base=base, max_rank=0)
    with pytest.raises(ValueError, match=r"units .* model"):
        ssah.export_lora(draw(tiny_models.build("gpt2")), folder, base=base)
    experts = tiny_models.build("mixtral")
    with pytest.raises(ValueError, match=r"experts\.down_proj .* packed experts is not"):
        ssah.export_lora(draw(experts, 0.1), folder, base=experts)
    with torch.no_grad():
        model.load_state_dict(base.state_dict())
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"down_proj\.weight is NaN"):
        ssah.export_lora(model, folder, base=base)
    assert not folder.exists()
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"must be new or empty"):
        ssah.export_lora(units, folder, base=base)
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]  # nothing half made


def test_a_plan_is_exported_while_it_trains(tmp_path: Path) -> None:
    model, base = (tiny_models.build("llama") for _ in range(2))
    plan = trained(model)
    before = {name: p.detach().clone() for name, p in plan.named_parameters()}
    made = ssah.export_lora(plan, tmp_path / "plan")
    assert ssah.export_lora(plan.model, tmp_path / "model", base=base) == made
    assert all(torch.equal(before[name], p) for name, p in plan.named_parameters())
    with pytest.raises(TypeError, match=r"base is given beside a plan"):
        ssah.export_lora(plan, tmp_path / "other", base=base)
    plan.close()
    late = make(model, "train_only")
    optimizer = late.optimizer(lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call plan\.keep_originals\(\)"):
        ssah.export_lora(late, tmp_path / "late")


def test_a_refusal_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """A plan that trained a NaN: its originals are not left in the place of what was trained."""
    model = tiny_models.build("llama")
    plan = trained(model)
    with torch.no_grad():
        list(plan.parameters())[-1].view(-1)[0] = float("nan")
    before = {name: p.detach().clone() for name, p in plan.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"is NaN or infinite before or after") as caught:
        ssah.export_lora(plan, tmp_path / "adapter")
    assert all(before[n].equal(p) or p.isnan().any() for n, p in plan.named_parameters())
    assert caught.tb is not None  # whose frames are alive
    plan.save_pretrained(tmp_path / "update")  # refused while the originals are there
    plan.close()
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match=r"is not in memory \(offloaded\)"):
        ssah.export_lora(draw(model, 0.1), tmp_path / "adapter", base=empty)
