"""Importance as an importance matrix of llama.cpp, read back with gguf-py."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scores import capture, ragged
from tiny_models import build

from ssah.attribution import Attribution, attribute, save_imatrix
from ssah.models import empty_model
from ssah.units import find_modules

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than two:UserWarning")


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}, fields


def by_quantize(tensors: dict[str, np.ndarray], weight: str) -> np.ndarray:
    """As ``load_imatrix`` of llama.cpp's quantize.cpp reads it, in its loops: [experts or 1, n]."""
    sums, counts = tensors[f"{weight}.in_sum2"], tensors[f"{weight}.counts"].ravel()
    found = np.ones_like(sums)
    for matrix in range(sums.shape[0]):
        for channel in range(sums.shape[1]):
            if counts[matrix] > 0:
                found[matrix, channel] = sums[matrix, channel] / counts[matrix]
    return found


@pytest.mark.parametrize("metric", ["variance", "fisher"])
def test_mean_squares_are_those_of_what_enters_b(metric: str, tmp_path: Path) -> None:
    model = build("llama")
    scores = attribute(model, ragged(), metric=metric)
    for _ in range(2):  # an earlier one is replaced
        returned = save_imatrix(scores, tmp_path / "imatrix.gguf", model)
    tensors, fields = read(tmp_path / "imatrix.gguf")
    assert len(tensors) == 8  # sums and counts of two weights in each of two layers
    captured = [(batch["labels"] != -100, capture(model, batch, False)[0]) for batch in ragged()]
    for layer in range(2):
        for module, weight in (
            (f"model.layers.{layer}.mlp.down_proj", f"blk.{layer}.ffn_down.weight"),
            (f"model.layers.{layer}.self_attn.o_proj", f"blk.{layer}.attn_output.weight"),
        ):
            x = torch.cat([inputs[module][keep] for keep, inputs in captured])  # [tokens, units]
            mean_square = x.square().mean(0)
            found = torch.from_numpy(by_quantize(tensors, weight))[0]
            torch.testing.assert_close(found.double(), mean_square, rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(returned[weight][0], mean_square, rtol=1e-5, atol=1e-9)
            assert tensors[f"{weight}.counts"].ravel().tolist() == [len(x)]
    assert fields["general.type"] == "imatrix"
    assert "general.architecture" not in fields
    assert fields["imatrix.chunk_count"] * fields["imatrix.chunk_size"] == len(x)
    assert fields["imatrix.datasets"] == [f"labels {scores.data_fingerprint}"]


def test_each_expert_has_its_own_tokens(tmp_path: Path) -> None:
    model = build("mixtral")
    scores = attribute(model, ragged()[:1], modules="mlp")
    save_imatrix(scores, tmp_path / "imatrix.gguf", model)
    tensors, _ = read(tmp_path / "imatrix.gguf")
    sums = tensors["blk.1.ffn_down_exps.weight.in_sum2"]
    counts = tensors["blk.1.ffn_down_exps.weight.counts"]
    names = [f"model.layers.1.mlp.experts.down_proj[{i}]" for i in range(len(sums))]
    assert counts.tolist() == [[scores.count[name]] for name in names]
    for name, own, (n,) in zip(names, sums, counts, strict=True):
        norms = torch.linalg.vector_norm(find_modules(model)[name].weight.double(), dim=0) ** 2
        norm = attribute(model, ragged()[:1], modules="mlp", metric="norm").scores[name]
        np.testing.assert_allclose(own, (norm / norms * n).numpy(), rtol=1e-5)
    # An expert that no token reached: llama-quantize then takes 1, and reads no sum.
    first = names[0]
    none = {**scores.count, first: 0}
    empty = {first: torch.zeros_like(scores.mean[first])}
    unreached = replace(
        scores,
        count=none,
        mean=scores.mean | empty,
        variance=scores.variance | {first: empty[first] * float("nan")},
    )
    save_imatrix(unreached, tmp_path / "imatrix.gguf", model)
    found = by_quantize(read(tmp_path / "imatrix.gguf")[0], "blk.1.ffn_down_exps.weight")
    assert (found[0] == 1).all()
    assert np.isfinite(found).all()


def test_names_and_widths_are_those_of_a_file_of_the_model(tmp_path: Path) -> None:
    import tiny_gguf

    tiny_gguf.write(tmp_path / "model.gguf")
    weights = {
        tensor.name: int(tensor.shape[0])  # of channels that enter it
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    model = empty_model(str(tmp_path / "model.gguf"))
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    squares = save_imatrix(invented(sizes), tmp_path / "imatrix.gguf", model)
    assert len(squares) == len(sizes)
    for weight, square in squares.items():
        assert square.shape[-1] == weights[weight]


def invented(sizes: dict[str, int], **changed: object) -> Attribution:
    values = {name: torch.ones(n, dtype=torch.float64) for name, n in sizes.items()}
    fields = {
        "metric": "variance",
        "tokens": "all",
        "model_name": "tiny",
        "units_hash": None,
        "data_fingerprint": "data",
    }
    counts = dict.fromkeys(sizes, 2)
    return Attribution(values, values, values, counts, **(fields | changed))  # type: ignore[arg-type]


def test_what_cannot_be_right_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "imatrix.gguf"
    mixture = build("mixtral")
    sizes = {name: module.n_units for name, module in find_modules(mixture, "mlp").items()}
    with pytest.raises(ValueError, match="all_experts=True, must be made without"):
        save_imatrix(invented(sizes, all_experts=True), path, mixture)
    with pytest.raises(ValueError, match=r"1 of the \d+ experts in 'blk.0.ffn_down_exps"):
        save_imatrix(invented(dict(list(sizes.items())[:1])), path, mixture)
    with pytest.raises(IsADirectoryError, match="a folder; it must be a file"):
        save_imatrix(invented(sizes), tmp_path, mixture)
    with pytest.raises(FileNotFoundError, match=r"no/imatrix\.gguf', whose folder does not exist"):
        save_imatrix(invented(sizes), tmp_path / "no" / "imatrix.gguf", mixture)
    path.write_bytes(b"GGUF" + b"of a model, general.type")
    with pytest.raises(FileExistsError, match="is there already and is no importance matrix"):
        save_imatrix(invented(sizes), path, mixture)
    assert path.read_bytes().startswith(b"GGUFof a model")
    path.unlink()
    opt = build("opt")
    with pytest.raises(ValueError, match="must be one that GGUF files have a name for"):
        save_imatrix(invented({n: m.n_units for n, m in find_modules(opt).items()}), path, opt)
    with pytest.raises(ValueError, match="the model LlamaForCausalLM has"):
        save_imatrix(invented(sizes), path, build("llama"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'gguf"):
        save_imatrix(invented(sizes), path, mixture)
    assert not path.exists()
