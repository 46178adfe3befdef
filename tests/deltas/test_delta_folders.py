"""Results as folders: what from_pretrained reads, sharded, tied, in pieces; whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from tuned import FAMILIES, assert_same_state, loaded, pair, saved, tuned_from

from ssah import deltas
from ssah.models import ModelError, load_model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_has_what_memory_has(name: str, tmp_path: Path) -> None:
    base, tuned = pair(name, torch.bfloat16)
    # The two are cut into files differently, and the result is cut as the tuned one is.
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned", "20KB")
    out = deltas.interpolate(*folders, 0.3, out=tmp_path / "out")
    assert out == tmp_path / "out"
    in_memory: Any = deltas.interpolate(base, tuned, 0.3)
    assert_same_state(loaded(tmp_path / "out"), in_memory)
    files = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"delta.json"}
    index = "model.safetensors.index.json"
    indices = [json.loads((tmp_path / each / index).read_text()) for each in ("tuned", "out")]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]


def test_what_lies_beside_the_weights_is_copied(tmp_path: Path) -> None:
    tiny_chat.save(tmp_path / "tuned")
    tiny_chat.model(seed=1).save_pretrained(tmp_path / "base")
    (tmp_path / "tuned" / "optimizer.pt").write_bytes(b"a training run's own")
    (tmp_path / "tuned" / "LICENSE").write_text("mine")
    deltas.keep(str(tmp_path / "base"), str(tmp_path / "tuned"), 0.5, out=tmp_path / "out")
    before, after = ({p.name for p in (tmp_path / f).iterdir()} for f in ("tuned", "out"))
    assert after == before - {"optimizer.pt"} | {"delta.json"}
    assert {"LICENSE", "tokenizer.json", "generation_config.json"} <= after
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_chat.TEMPLATE
    record = json.loads((tmp_path / "out" / "delta.json").read_text())
    assert (record["edit"], record["share"], record["tuned"]) == (
        "keep",
        0.5,
        [str(tmp_path / "tuned")],
    )


def test_names_of_older_files_are_those_of_the_model(tmp_path: Path) -> None:
    """GPT-2 on the Hub lacks the prefix, and has buffers that nothing reads any more."""
    base, tuned = pair("gpt2")
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    file = tmp_path / "base" / "model.safetensors"
    old = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(old, file, {"format": "pt"})
    deltas.interpolate(*folders, 0.5, out=tmp_path / "out")
    assert_same_state(loaded(tmp_path / "out"), deltas.interpolate(base, tuned, 0.5))  # type: ignore[arg-type]


def test_a_head_that_training_untied_is_compared_with_the_embedding(tmp_path: Path) -> None:
    base, _ = pair("llama_tied")
    folder = saved(base, tmp_path / "base")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    untied = type(base)(config)
    untied.load_state_dict(base.state_dict())
    tuned = tuned_from(untied)
    deltas.interpolate(folder, saved(tuned, tmp_path / "tuned"), 0.5, out=tmp_path / "out")
    found = loaded(tmp_path / "out")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        before = base.get_input_embeddings().weight.double()  # type: ignore[union-attr]
        expected = (before + tuned.get_parameter(name).double()) / 2
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-7, atol=0)
    assert found["lm_head.weight"].ne(found["model.embed_tokens.weight"]).any()


def test_a_gguf_file_can_be_the_base(tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "base.gguf")
    base = load_model(str(tmp_path / "base.gguf"))[0]
    tuned = tuned_from(base)
    folder = saved(tuned, tmp_path / "tuned")
    deltas.interpolate(str(tmp_path / "base.gguf"), folder, 0.5, out=tmp_path / "out")
    assert_same_state(loaded(tmp_path / "out"), deltas.interpolate(base, tuned, 0.5))  # type: ignore[arg-type]


def test_a_base_in_memory_goes_with_a_folder_of_what_was_tuned(tmp_path: Path) -> None:
    """So it is with ``smollm2``, whose GGUF file is loaded."""
    base, tuned = pair("llama_tied")
    deltas.interpolate(base, saved(tuned, tmp_path / "tuned"), 0.5, out=tmp_path / "out")
    assert_same_state(loaded(tmp_path / "out"), deltas.interpolate(base, tuned, 0.5))  # type: ignore[arg-type]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = pair("llama_tied")
    with torch.no_grad():
        tuned.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 4] = float("nan")
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned", "20KB")
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        deltas.interpolate(*folders, 0.5, out=tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())
    # What only puts weights back computes nothing from them.
    deltas.rewind(*folders, "model.layers.1", out=tmp_path / "mended")
    assert all(tensor.isfinite().all() for tensor in loaded(tmp_path / "mended").values())


def _other_vocabulary(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = 130
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(config).save_pretrained(folder)


def _without_a_norm(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})


def _other_architecture(folder: Path) -> None:
    pair("gpt2")[0].save_pretrained(folder)


def _quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))


def _cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_vocabulary, r"'model\.embed_tokens\.weight' is \[1(28|30), 48\].*one vocabulary"),
        (_without_a_norm, r"lacks 1 tensors .*'model\.norm\.weight'"),
        (_other_architecture, "lacks .* tensors .* of two models"),
        (_quantised, "is quantised, must be plain weights"),
        (_cut_off, "not safetensors, or was cut off"),
    ],
)
def test_other_models_are_refused_by_name(
    change: Any, message: str, which: str, tmp_path: Path
) -> None:
    base, tuned = pair("llama_tied")
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    change(tmp_path / which)
    with pytest.raises(ValueError, match=message):
        deltas.interpolate(*folders, 0.5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_places_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    base, tuned = pair("llama_tied")
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    with pytest.raises(ValueError, match="out is None, must be a folder"):
        deltas.interpolate(*folders, 0.5)
    with pytest.raises(FileExistsError, match="must be new or empty"):
        deltas.keep(*folders, 0.5, out=tmp_path / "base")
    with pytest.raises(ValueError, match=r"must be None where .* is no folder of safetensors"):
        deltas.interpolate(base, tuned, 0.5, out=tmp_path / "out")
    with pytest.raises(ModelError, match="there is no such folder"):
        deltas.interpolate("./nowhere", folders[1], 0.5, out=tmp_path / "out")
    with pytest.raises(TypeError, match="tuned is a int, must be a folder"):
        deltas.interpolate(base, 3, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has not all of .* here: load it into memory"):
        deltas.interpolate(base, tuned.to("meta"), 0.5)
