"""``ssah export``: an update, a tuned model, or an ablation as an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from group_scores import attribution
from plans import draw
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ssah
from ssah.cli import app
from ssah.units import units_hash


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_an_update_a_model_and_an_ablation(tiny_chat_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_chat_folder, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    units = draw(model, 0.1)
    with ssah.train_only(model, units) as plan, torch.no_grad():
        for parameter in plan.parameters():
            parameter.mul_(1.5)
        plan.save_pretrained(tmp_path / "update")
    model.save_pretrained(tmp_path / "tuned")
    found = {}
    for name in ("update", "tuned"):
        words = ("--change", tmp_path / name, "--out", tmp_path / f"{name}_adapter", "--json")
        code, out, error = run(folder, *words)
        assert code == 0, error
        found[name] = json.loads(out)
        assert (tmp_path / f"{name}_adapter" / "adapter_model.safetensors").is_file()
    assert found["update"]["ranks"] == found["tuned"]["ranks"]
    assert found["update"]["rank"] == max(found["update"]["ranks"].values())

    scores = [
        attribution(
            {name: torch.rand(n, dtype=torch.float64) for name, n in units.sizes.items()},
            units_hash=units_hash(model),
            data_fingerprint=data,
        )
        for data in ("safety", "utility")
    ]
    ssah.classify(*scores, scu=0.1, ucu=0.1, ru=0.1).save(tmp_path / "groups")
    words = ("--groups", tmp_path / "groups", "--units", "scu", "--out", tmp_path / "ablation")
    code, shown, error = run(folder, *words)
    assert code == 0, error
    assert "bit for bit" in shown
    # A base model that is an update itself: its own base is where --base says.
    folder = folder.rename(tmp_path / "elsewhere")
    words = (*words[:-1], tmp_path / "of_update")
    assert run(tmp_path / "update", *words)[0] == 2
    code, _, error = run(tmp_path / "update", "--base", folder, *words)
    assert code == 0, error
    made = load_file(tmp_path / "of_update" / "adapter_model.safetensors")
    name = next(each for each in made if each.endswith("down_proj.lora_B.weight"))
    scu = ssah.UnitGroups.load(tmp_path / "groups")["scu"]
    down = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    assert torch.equal(made[name], -model.get_submodule(down).weight[:, scu[down]])
    for words, message in (
        ((), "either --change"),
        (("--groups", "."), "either --change"),
        (("--change", tmp_path / "update", "--max-rank", 1), "max_rank=1"),
    ):
        code, _, error = run(folder, *words, "--out", tmp_path / "none")
        assert code == 2, error
        assert message in error
    assert not (tmp_path / "none").exists()


def test_an_importance_matrix(tiny_chat_folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_folder)
    ids = torch.arange(12).reshape(2, 6)
    scores = ssah.attribute(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    scores.save(tmp_path / "scores")
    words = ("--imatrix", tmp_path / "scores", "--out", tmp_path / "imatrix.gguf")
    code, out, error = run(tiny_chat_folder, *words, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found["tokens"] == 12
    tensors = {each.name for each in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    assert tensors == {f"{w}.{part}" for w in found["weights"] for part in ("in_sum2", "counts")}
    for more, message in (
        (("--change", "runs/update"), "no two of them"),
        (("--max-rank", 512), "max_rank is 512, must be left out with --imatrix"),
        (("--dtype", "bfloat16"), "dtype is 'bfloat16', must be left out with --imatrix"),
        (("--base", "smollm2"), "base is 'smollm2', must be left out with --imatrix"),
    ):
        code, _, error = run(tiny_chat_folder, *words, *more)
        assert code == 2
        assert message in error
