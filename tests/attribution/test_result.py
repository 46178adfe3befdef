"""Attribution: saved and loaded, whole or not at all, and whose model it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scores import ragged
from tiny_models import build
from transformers import AutoModel

from ssah.attribution import Attribution, attribute
from ssah.storage import files as records
from ssah.storage import load_tensors, save_tensors


class Boom(Exception):
    pass


def test_save_and_load(tmp_path: Path) -> None:
    model = build("llama")
    result = attribute(model, ragged(), metric="norm")
    result.save(tmp_path / "a")
    other = Attribution.load(tmp_path / "a", model)
    assert vars(other).keys() == vars(result).keys()
    for field in ("scores", "mean", "variance"):
        for key, tensor in getattr(result, field).items():
            assert torch.equal(getattr(other, field)[key], tensor)
    for field in ("count", "metric", "tokens", "model_name", "units_hash", "version"):
        assert getattr(other, field) == getattr(result, field)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta["data_fingerprint"] == result.data_fingerprint
    assert other.data_fingerprint == result.data_fingerprint
    Attribution.load(tmp_path / "a", build("llama", dtype=torch.bfloat16, seed=3))
    headless = AutoModel.from_config(model.config)  # its modules have other names
    with pytest.raises(ValueError, match=r"attribution was made on .*Llama.*units are others"):
        Attribution.load(tmp_path / "a", headless)


def test_a_result_belongs_to_the_units(tmp_path: Path) -> None:
    """Settings that shape no unit do not matter, nor what a later release adds."""
    model = build("llama")
    attribute(model, ragged()).save(tmp_path)
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 3)
    model.config.attention_dropout = 0.1
    model.config.a_setting_of_next_year = "new"
    Attribution.load(tmp_path, model)
    meta = json.loads((tmp_path / "meta.json").read_text())
    tensors, _ = load_tensors(tmp_path)
    record = {k: v for k, v in meta.items() if k not in ("tensors", "sha256", "meta_sha256")}
    save_tensors(tmp_path, tensors, {**record, "format": 3, "a_field_of_next_year": [1]})
    Attribution.load(tmp_path, model)
    older = {k: v for k, v in record.items() if k not in ("format", "units_hash")}
    save_tensors(tmp_path, tensors, {**older, "config_hash": "of every setting"})
    assert Attribution.load(tmp_path, model).units_hash is None
    with pytest.raises(ValueError, match="units in"):
        Attribution.load(tmp_path, build("gpt2"))


def test_a_result_of_one_kind_does_not_replace_another(tmp_path: Path) -> None:
    scores = {"a": torch.ones(2)}
    save_tensors(tmp_path, scores, {"content": "scores", "n": 1})
    with pytest.raises(ValueError, match="holds 'scores', which 'groups' must not replace"):
        save_tensors(tmp_path, scores, {"content": "groups"})
    assert load_tensors(tmp_path)[1] == {"content": "scores", "n": 1}
    save_tensors(tmp_path, scores, {"content": "scores", "n": 2})
    assert load_tensors(tmp_path)[1]["n"] == 2


def test_a_save_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tensors(tmp_path, {"x": torch.ones(3)}, {"n": 1})
    monkeypatch.setattr("ssah.storage.files.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_tensors(tmp_path, {"x": torch.zeros(3)}, {"n": 2})
    monkeypatch.undo()
    replace = records.os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == "meta.json":
            raise Boom
        replace(source, target)

    monkeypatch.setattr("ssah.storage.files.os.replace", fail)
    with pytest.raises(Boom):
        save_tensors(tmp_path, {"x": torch.zeros(3)}, {"n": 2})
    monkeypatch.undo()
    tensors, meta = load_tensors(tmp_path)
    assert torch.equal(tensors["x"], torch.ones(3))
    assert meta == {"n": 1}
    save_tensors(tmp_path, {"x": torch.zeros(3)}, {"n": 3})
    assert load_tensors(tmp_path)[1] == {"n": 3}
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="it must hold 'attribution'"):
        Attribution.load(tmp_path)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"no")
    with pytest.raises(ValueError, match="not those"):
        load_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing was saved there"):
        Attribution.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="reserved keys"):
        save_tensors(tmp_path, {}, {"sha256": 1})


def test_repr_is_one_line_without_tensors() -> None:
    result = attribute(build("llama"), ragged(), metric="norm")
    text = repr(result)
    units, counted = sum(map(len, result.scores.values())), max(result.count.values())
    assert f"'norm' of {units} units in {len(result.scores)} modules, {counted} tokens" in text
    assert f"data='{result.data_fingerprint[:12]}'" in text
    assert "tensor" not in text
    assert len(text) < 300
