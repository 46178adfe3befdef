"""Quantised models are never trained; they load packed, and commands take them; GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from commands import call, fails
from packed_models import FOUR_BIT, LAID_OUT, ROUNDED, SCHEMES, Build, missing, stands_for
from plans import draw
from scores import ragged
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ssah
from ssah.attribution import attribute, column_sq_norms
from ssah.models import ModelError, dequantised, load_model, loading, locate, packed_modules
from ssah.models import packed as quantised
from ssah.units import find_modules

# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_pruning_and_updates_are_refused(
    build: Build, scheme: str, folder: Path, tmp_path: Path
) -> None:
    model = build(scheme)
    units = draw(model)
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    ssah.freeze(plain, draw(plain)).save_pretrained(tmp_path)
    refused = (
        lambda: ssah.freeze(model, units),
        lambda: ssah.train_only(model, units),
        lambda: ssah.prune(model, units),
        lambda: ssah.load_update(model, tmp_path),
    )
    for attempt in refused:
        with pytest.raises(ValueError, match=rf"quantised \({SCHEMES[scheme][0]}\)") as error:
            attempt()
        assert str(error.value).endswith(quantised.scheme_of(first(model)).instead)


def first(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(next(iter(packed_modules(model))))


@pytest.mark.parametrize("scheme", ["bnb-8bit", *FOUR_BIT, *LAID_OUT[::2]])
def test_what_the_refusal_advises_works(build: Build, scheme: str) -> None:
    model = build(scheme)
    before = column_sq_norms(next(iter(find_modules(model).values())))
    model.dequantize()
    assert not packed_modules(model)
    after = column_sq_norms(next(iter(find_modules(model).values())))
    # There the module would have computed with values and scales rounded to bfloat16.
    rtol = (1 + ROUNDED) ** 2 - 1 if scheme in LAID_OUT else 1e-4
    torch.testing.assert_close(after, before, rtol=rtol, atol=0)
    ssah.freeze(model, draw(model)).close()


def test_a_weight_that_torchao_cannot_dequantise_is_refused() -> None:
    missing("torchao")
    from torchao.utils import TorchAOBaseTensor

    class Opaque(TorchAOBaseTensor):
        pass

    module = nn.Linear(2, 2)
    del module.weight
    module.weight = torch.zeros(2, 2).as_subclass(Opaque)
    with pytest.raises(ValueError, match="Opaque, which torchao cannot dequantise"):
        dequantised(module)


# ----------------------------------------------------------------------------- loading, commands


@pytest.mark.parametrize("scheme", ["bnb-8bit", "bnb-nf4", "torchao-int8", *LAID_OUT[2:]])
def test_a_saved_model_loads_quantised_and_the_commands_take_it(
    build: Build, scheme: str, tmp_path: Path
) -> None:
    build(scheme).save_pretrained(tmp_path / "model")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model"))
    assert {found.name for found in packed_modules(model).values()} == {SCHEMES[scheme][0]}
    data = ("--data", "builtin:safety", "--limit", 6)
    call("attribute", tmp_path / "model", *data, "--out", tmp_path / "run")
    loader = ssah.data.make_loader("builtin:safety", tokenizer, limit=6, batch_size=8)
    saved = ssah.Attribution.load(tmp_path / "run", model)
    for name, score in attribute(model, loader).scores.items():
        torch.testing.assert_close(saved.scores[name], score)
    about = json.loads(call("info", "--model", tmp_path / "model", "--json").stdout)["model"]
    assert about["quantised"] == SCHEMES[scheme][0].split()[0]
    loaded = ssah.info.describe_model(model, "loaded")
    assert loaded["quantised"] == SCHEMES[scheme][0]
    assert (loaded["parameters"], loaded["owned"]) == (about["parameters"], about["owned"])


def test_info_says_where_a_scheme_is_not_known(build: Build, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    about = json.loads(call("info", "--model", tmp_path, "--json").stdout)["model"]
    assert about["quantised"] == "gptq, which must be dequantised to be scored"
    assert "gptq" in call("info", "--model", tmp_path).output


# ---------------------------------------------------------------------------------------- GGUF


def test_gguf_blocks_are_what_the_package_says_they_are(build: Build, tmp_path: Path) -> None:
    """Beside gguf's own code, for several types; and the scores beside those of the whole model."""
    build("gguf")  # skips where it cannot be read
    import tiny_gguf
    from gguf import GGMLQuantizationType, GGUFReader, quants

    for kind in ("Q8_0", "Q4_0", "Q4_1"):
        file = tmp_path / kind / "tiny.gguf"
        file.parent.mkdir()
        tiny_gguf.write(file, GGMLQuantizationType[kind])
        model = load_model(str(file), packed=True)[0]
        tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        tensor = tensors["blk.1.ffn_down.weight"]
        wanted = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(dequantised(model.model.layers[1].mlp.down_proj), wanted)
        whole = attribute(load_model(str(file))[0], ragged()).scores
        for name, score in attribute(model, ragged()).scores.items():
            torch.testing.assert_close(score, whole[name], rtol=1e-4, atol=0)


def test_gguf_channels_that_a_module_gathers(build: Build) -> None:
    """Its blocks are as in the file, so that its input is brought into their order."""
    down = build("gguf").model.layers[0].mlp.down_proj
    down.input_permutation = torch.randperm(down.in_features)
    torch.testing.assert_close(dequantised(down), stands_for(down), rtol=1e-5, atol=1e-6)


def test_gguf_commands(build: Build, folder: Path, tmp_path: Path) -> None:
    build("gguf")
    file = folder / "tiny.gguf"
    data = ("--data", "builtin:safety", "--limit", 4)
    for name, options in (("packed", ("--packed",)), ("plain", ())):
        call("attribute", file, *data, "--out", tmp_path / name, *options)
    packed, plain = (ssah.Attribution.load(tmp_path / name) for name in ("packed", "plain"))
    assert packed.units_hash == plain.units_hash
    for name, score in plain.scores.items():
        torch.testing.assert_close(packed.scores[name], score, rtol=1e-4, atol=0)
    shares = ("--scu", 0.1, "--ucu", 0.1, "--ru", 0.2)
    other = ("--data", "builtin:utility", "--limit", 4, "--out", tmp_path / "utility")
    call("attribute", file, *other)
    call(
        "classify", tmp_path / "packed", tmp_path / "utility", *shares, "--out", tmp_path / "groups"
    )
    groups = ("--groups", tmp_path / "groups", "--group", "ru", "--limit", 2)
    rows = [
        json.loads(call("ablate", file, *groups, *options, "--json").stdout)["rows"]
        for options in ((), ("--packed",))
    ]
    for a, b in zip(*rows, strict=True):
        assert a["utility_loss"] == pytest.approx(b["utility_loss"], rel=1e-4)
    line = fails("attribute", file, *data, "--out", tmp_path / "no", "--packed", "--stream")
    assert "--packed is for a model in memory" in line


def test_packed_where_nothing_can_be(build: Build, folder: Path, tmp_path: Path) -> None:
    build("gguf")
    import tiny_gguf
    from gguf import GGMLQuantizationType

    with pytest.raises(ModelError, match="is no GGUF file"):
        load_model(str(folder / "plain"), packed=True)
    tiny_gguf.write(tmp_path / "plain.gguf", GGMLQuantizationType.F32)
    with pytest.raises(ModelError, match=r"no quantised weights.*qwen35"):
        load_model(str(tmp_path / "plain.gguf"), packed=True)


def test_a_gguf_file_is_parsed_once(
    build: Build, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for it while a model is loaded gets the same; afterwards nothing is kept."""
    build("gguf")
    import gguf

    file, own = folder / "tiny.gguf", (gguf.GGUFReader, gguf.get_tensor_name_map)
    asked = []

    def asks(name: str) -> None:
        plain = getattr(loading, name)

        def asking(*args: Any, **options: Any) -> Any:
            asked.append(
                (gguf.GGUFReader(file), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2))
            )
            return plain(*args, **options)

        monkeypatch.setattr(loading, name, asking)

    asks("load_tokenizer")
    asks("whole")  # the weights
    load_model(str(file))
    tokenizers, weights = asked
    assert all(a is b for a, b in zip(tokenizers, weights, strict=True))
    load_model(str(file), packed=True)
    assert asked[2][0] is asked[3][0] is not weights[0]  # another call: the file may have changed
    assert own == (gguf.GGUFReader, gguf.get_tensor_name_map)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError):
        load_model(str(tmp_path / "cut.gguf"))
    assert own == (gguf.GGUFReader, gguf.get_tensor_name_map)


@pytest.mark.exhaustive
@pytest.mark.real
def test_real_blocks(smollm2: Path) -> None:
    """SmolLM2 with its FFNs and the outputs of attention as the blocks of its file.

    transformers unpacks files of this architecture, with gguf's code: what that gives is what the
    blocks are held against.
    """
    missing("accelerate")
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict
    from transformers.integrations.gguf.utils import GgufLinear

    model, tokenizer = load_model(str(smollm2))
    loader = ssah.data.make_loader("builtin:safety", tokenizer, limit=2, max_length=64)
    whole = attribute(model, loader)
    source, file, _ = locate("smollm2")
    tensors = load_gguf_state_dict(GgufHeader.from_file(f"{source}/{file}"))
    for i, layer in enumerate(model.model.layers):
        for leaf, name in (
            ("ffn_down", "mlp.down_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("attn_output", "self_attn.o_proj"),
        ):
            plain, tensor = layer.get_submodule(name), tensors[f"blk.{i}.{leaf}.weight"]
            packed = GgufLinear(plain.in_features, plain.out_features, tensor.ggml_type)
            packed.weight.data = tensor[...]
            layer.set_submodule(name, packed)
            if i == 7:
                torch.testing.assert_close(dequantised(packed), plain.weight.detach())
    assert len(packed_modules(model)) == 30 * 4
    scores = attribute(model, loader).scores
    for name, score in whole.scores.items():
        assert (scores[name] - score).norm() <= 1e-4 * score.norm()
