"""Scores of models that are not in memory: streamed from their files, or offloaded.

`family_checks.py` streams every family.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_chat
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from commands import call, fails
from streamed import assert_same, batches, dying, in_memory, saved, spoil
from tiny_models import FAMILIES, VOCABULARY, build, collate, rows
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    MixtralConfig,
    PreTrainedModel,
)

from ssah.attribution import METRICS, Attribution, attribute, stream, watch
from ssah.attribution.streaming import run as streaming
from ssah.attribution.streaming.layers import LayeredModel
from ssah.attribution.streaming.resuming import FileState
from ssah.models import Checkpoint, ModelError
from ssah.units import families


def weights_of(folder: str) -> dict[str, Tensor]:
    return safetensors.torch.load((Path(folder) / "model.safetensors").read_bytes())


def write_weights(folder: str, weights: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})


# ----------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_shards_dtypes_and_padding(dtype: torch.dtype, side: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "gemma2", dtype=dtype, max_shard_size="30KB")
    assert len(list(Path(folder).glob("*.safetensors"))) > 3
    for options in ({}, {"metric": "norm", "tokens": "all"}, {"modules": "attention"}):
        result, _ = stream(folder, batches(side), **options)
        assert_same(result, in_memory(folder, batches(side), **options))


def test_layers_that_return_tuples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = families.FFN(down="mlp.dense_4h_to_h", up="mlp.dense_h_to_4h")
    monkeypatch.setitem(families.FAMILIES, "bloom", families.Family("h", ffn, None))
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4)
    folder = str(tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    expected = in_memory(folder, batches())
    for state in (None, tmp_path / "state"):
        assert_same(stream(folder, batches(), resume_dir=state)[0], expected)


def test_weights_that_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = families.Attention(down="self_attn.o_proj", value="self_attn.v_proj")
    family = families.Family("layers", None, attention)
    monkeypatch.setitem(families.FAMILIES, "mixtral", family)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    config = MixtralConfig(vocab_size=VOCABULARY, **sizes, **heads)
    folder = str(tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert any(".experts.3." in name for name in weights_of(folder))  # in the model they are one
    result, traffic = stream(folder, batches(), modules="attention")
    assert_same(result, in_memory(folder, batches(), modules="attention"))
    assert traffic.bytes_read == traffic.bytes_needed


def test_each_weight_is_read_once_and_the_head_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model")
    weights = weights_of(folder)
    read: list[str] = []
    original = Checkpoint.read

    def spy(self: Checkpoint, names: Any) -> dict[str, Tensor]:
        read.extend(names)
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", spy)
    _, traffic = stream(folder, batches())
    assert sorted(read) == sorted(set(weights) - {"lm_head.weight"})
    assert traffic.bytes_read == sum(weights[name].nbytes for name in read)


def test_one_layer_at_a_time_has_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model")
    seen: list[list[int]] = []
    original = streaming._run_layer

    def spy(layered: LayeredModel, *args: Any) -> None:
        layers = enumerate(layered.layers)
        seen.append([i for i, layer in layers if not next(layer.parameters()).is_meta])
        original(layered, *args)

    monkeypatch.setattr(streaming, "_run_layer", spy)
    stream(folder, batches())
    assert seen == [[0], [1]]


def test_hidden_states_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = saved(tmp_path / "model"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    written: list[Path] = []
    original = FileState.put
    monkeypatch.setattr(
        FileState, "put", lambda self, *a: (written.append(self.folder), original(self, *a))
    )
    result, _ = stream(folder, batches(), hidden_memory=0)
    assert_same(result, in_memory(folder, batches()))
    assert len(written) == 2  # two batches, after the first layer
    assert written[0].parent == scratch
    assert not list(scratch.iterdir())


def test_more_rows_than_are_run_at_a_time(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", dtype=torch.bfloat16)
    data = [collate(rows(range(20, 60), seed=seed)) for seed in (0, 1)]
    assert sum(len(row) for row in data[0]["input_ids"]) > 2 * watch._ROWS_AT_ONCE
    assert_same(stream(folder, data)[0], in_memory(folder, data))


def test_tied_embeddings_under_the_name_of_the_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama_tied")
    weights = weights_of(folder)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    write_weights(folder, weights)
    result, _ = stream(folder, batches())
    assert_same(result, in_memory(folder, batches()))


def test_backbone_saved_without_its_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "backbone")
    result, _ = stream(str(tmp_path / "backbone"), batches())
    expected = in_memory(folder, batches())
    assert all(torch.equal(result.scores[name], score) for name, score in expected.scores.items())


def test_another_dtype_than_the_stored_one(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    result, _ = stream(folder, batches(), dtype="bfloat16")
    assert_same(result, attribute(model, batches()))


# ---------------------------------------------------------------------------------- interruptions


def test_killed_at_any_write_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    expected = in_memory(folder, batches())
    nth, killed = 1, True
    while killed:
        state = tmp_path / f"state-{nth}"
        killed = dying(nth, lambda state=state: stream(folder, batches(), resume_dir=state))
        result, traffic = stream(folder, batches(), resume_dir=state)
        assert_same(result, expected)
        nth += 1
    # Two hidden states, sums and meta of the first layer; sums and meta of the last.
    assert nth - 2 == 6
    assert traffic.bytes_read == 0


def test_a_resumed_run_reads_what_is_left(tmp_path: Path) -> None:
    folder, state = saved(tmp_path / "model"), tmp_path / "state"
    assert dying(5, lambda: stream(folder, batches(), resume_dir=state))
    result, traffic = stream(folder, batches(), resume_dir=state)
    assert_same(result, in_memory(folder, batches()))
    weights = weights_of(folder)
    first = sum(w.nbytes for name, w in weights.items() if name.startswith("model.layers.0."))
    assert traffic.bytes_read == traffic.bytes_needed - first


@pytest.mark.parametrize("what", ["tensors-*", "meta.json", "hidden-000001*"])
@pytest.mark.parametrize("cut", [True, False])
def test_damaged_state_is_named(what: str, cut: bool, tmp_path: Path) -> None:
    folder, state = saved(tmp_path / "model"), tmp_path / "state"
    assert dying(5, lambda: stream(folder, batches(), resume_dir=state))
    (path,) = (state / "layer-0000").glob(what)
    spoil(path, cut=cut)
    with pytest.raises(ValueError, match=rf"{path.name}' is damaged.*remove '{state}'"):
        stream(folder, batches(), resume_dir=state)


def test_state_of_another_run_is_refused(tmp_path: Path) -> None:
    folder, state = saved(tmp_path / "model"), tmp_path / "state"
    stream(folder, batches(), resume_dir=state)
    with pytest.raises(ValueError, match="unfinished run with data"):
        stream(folder, batches()[::-1], resume_dir=state)
    with pytest.raises(ValueError, match="unfinished run with modules"):
        stream(folder, batches(), resume_dir=state, modules="mlp")
    stream(folder, batches(), resume_dir=state, metric="norm")  # the same sums serve both


def test_not_a_number_is_named_and_earlier_layers_are_kept(tmp_path: Path) -> None:
    folder, state = saved(tmp_path / "model"), tmp_path / "state"
    weights = weights_of(folder)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    write_weights(folder, weights)
    with pytest.raises(FloatingPointError, match=r"model.layers.1.mlp.down_proj"):
        stream(folder, batches(), resume_dir=state)
    assert (state / "layer-0000" / "meta.json").is_file()
    assert not (state / "layer-0001" / "meta.json").exists()


# ------------------------------------------------------------------------------------- wrong input


def test_gradient_metrics_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'taylor', which needs gradients: going backward"):
        stream("no/model", batches(), metric="taylor")


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    file, weights = Path(folder) / "model.safetensors", weights_of(folder)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors' is not safetensors, or was cut off"):
        stream(folder, batches())
    file.write_bytes(content[:5])
    with pytest.raises(ModelError, match="is not safetensors, or was cut off"):
        stream(folder, batches())
    name = "model.layers.1.self_attn.v_proj.weight"
    write_weights(folder, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(ModelError, match=f"has no weight '{name}'"):
        stream(folder, batches())
    write_weights(folder, {**weights, name: torch.zeros(5, 48)})
    with pytest.raises(ModelError, match=rf"'{name}' has shape \(5, 48\), must have \(24, 48\)"):
        stream(folder, batches())
    file.unlink()
    with pytest.raises(ModelError, match=r"there is no model.safetensors"):
        stream(folder, batches())


def test_quantised_and_unfit_models_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    config = Path(folder) / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps({**plain, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="is quantised"):
        stream(folder, batches())
    config.write_text(json.dumps({**plain, "num_kv_shared_layers": 1}))
    with pytest.raises(ValueError, match="take keys and values from earlier ones"):
        stream(folder, batches())
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelError, match="must be safetensors to be streamed"):
        stream(str(tmp_path / "weights.gguf"), batches())


@pytest.mark.parametrize(("data", "message"), [([], "no batch"), ([{"x": 1}], "'input_ids'")])
def test_wrong_loader_fails_before_weights_are_read(
    data: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model")
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(ValueError, match=message):
        stream(folder, data)


# ------------------------------------------------------------------------------------ command line


def test_command(tmp_path: Path) -> None:
    tiny_chat.save(tmp_path / "model")

    def run(out: str, *options: str) -> dict[str, Any]:
        data = ("--data", "builtin:safety", "--limit", 12)
        result = call("attribute", tmp_path / "model", *data, "--out", tmp_path / out, *options)
        return json.loads(result.stdout)

    plain, streamed = run("plain", "--json"), run("streamed", "--stream", "--json")
    traffic = streamed.pop("traffic")
    assert traffic["bytes_read"] == traffic["bytes_needed"] > 0
    different = {"out", "seconds"}
    assert {k: v for k, v in plain.items() if k not in different} == {
        k: v for k, v in streamed.items() if k not in different
    }
    found, expected = (Attribution.load(tmp_path / out) for out in ("streamed", "plain"))
    assert_same(found, expected)
    assert not (tmp_path / "streamed" / "unfinished").exists()


def test_all_experts_is_refused_with_stream(tmp_path: Path) -> None:
    options = ("--data", "builtin:safety", "--out", tmp_path / "out", "--stream", "--all-experts")
    assert "leave --stream out" in fails("attribute", tmp_path / "model", *options)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- offload


def offloaded(model: PreTrainedModel, how: str, folder: Path) -> PreTrainedModel:
    """``model``, some or all of whose weights are fetched when they are used."""
    if how == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif how == "disk":
        disk_offload(model, str(folder), torch.device("cpu"))
    elif how == "dispatch":
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
        dispatch_model(model, places, offload_dir=str(folder), force_hooks=True)
    else:
        model.save_pretrained(folder / "saved")
        places = {"model.embed_tokens": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu"}
        places |= {"model.layers": "disk", "lm_head": "cpu"}
        model = AutoModelForCausalLM.from_pretrained(
            folder / "saved", device_map=places, offload_folder=folder / "offload"
        )
    return model


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch", "device_map"])
def test_offloaded_models_have_the_bits_of_those_in_memory(how: str, tmp_path: Path) -> None:
    for metric in METRICS:
        expected = attribute(build("llama"), batches(), metric=metric)
        folder = tmp_path / metric
        folder.mkdir()
        model = offloaded(build("llama"), how, folder)
        assert any(parameter.is_meta for parameter in model.parameters())
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        result = attribute(model, batches(), metric=metric)
        for name, module in model.named_modules():
            assert vars(module).get("forward") is before[name].get("forward"), name
            assert vars(module).get("_old_forward") is before[name].get("_old_forward"), name
        assert any(parameter.is_meta for parameter in model.parameters())
        for name, score in expected.scores.items():
            assert torch.equal(result.scores[name], score), f"{metric} of {name}"


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gemma3"])
def test_other_families_offloaded(name: str) -> None:
    expected = attribute(build(name), batches())
    model = build(name)
    cpu_offload(model, torch.device("cpu"))
    result = attribute(model, batches())
    for key, score in expected.scores.items():
        assert torch.equal(result.scores[key], score), key


def test_offloaded_weights_are_fetched_once_however_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "_ROWS_AT_ONCE", 4)
    expected = attribute(build("llama"), batches()[:1])
    model = build("llama")
    cpu_offload(model, torch.device("cpu"))
    up = model.model.layers[0].mlp.up_proj
    fetched: list[str] = []
    original = up._hf_hook.pre_forward
    monkeypatch.setattr(
        up._hf_hook, "pre_forward", lambda *a, **k: (fetched.append("up"), original(*a, **k))[1]
    )
    result = attribute(model, batches()[:1])
    assert fetched == ["up"]
    assert all(torch.equal(result.scores[key], score) for key, score in expected.scores.items())


def test_weights_that_nothing_fetches_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    with pytest.raises(ValueError, match="on the meta device, without a hook"):
        attribute(model, batches())
