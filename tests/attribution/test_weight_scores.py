"""Scores of single weights, against gradients and inputs of one row at a time in float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from in_float64 import InFloat64
from tiny_models import EXPERTS, FAMILIES, IGNORED, build, collate, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import ssah
from ssah.attribution import WeightAttribution, attribute_weights
from ssah.attribution.weights.sums_on_disk import zeros_on_disk
from ssah.distributed import Ranks

MODELS = ["llama", "gpt2", "mixtral", "gemma3"]
DATA = [rows(seed=1), rows((8, 5), seed=2)]


def batches() -> list[dict[str, Tensor]]:
    """Six ragged rows in two batches, padded on the left and on the right."""
    return [collate(DATA[0], side="left"), collate(DATA[1])]


def loss_of(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Of one row without padding, summed over its labels."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return nn.functional.cross_entropy(
        logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum"
    )


def by_autograd(model: PreTrainedModel, metric: str, params: list[str]) -> dict[str, Tensor]:
    """One backward pass a row: the mean of |w g| or of its square."""
    data = [row for part in DATA for row in part]
    weights = [model.get_parameter(param) for param in params]
    sums = [torch.zeros_like(weight) for weight in weights]
    for ids, labels in data:
        found = torch.autograd.grad(loss_of(model, ids, labels), weights)
        for total, weight, gradient in zip(sums, weights, found, strict=True):
            product = (weight * gradient).detach().abs()
            total += product if metric == "snip" else product**2
    return {param: total / len(data) for param, total in zip(params, sums, strict=True)}


def assert_close(found: WeightAttribution, expected: dict[str, Tensor]) -> None:
    assert list(found.scores) == list(expected)
    for param, score in found.scores.items():
        reference = expected[param]
        torch.testing.assert_close(
            score.double(), reference, rtol=2e-6, atol=1e-9 * float(reference.max())
        )


@pytest.mark.parametrize("name", [*MODELS, "gpt_oss", "olmo"])
@pytest.mark.parametrize("metric", ["snip", "fisher"])
def test_gradient_scores_are_those_of_one_backward_pass_a_row(name: str, metric: str) -> None:
    model = build(name, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with InFloat64():
        found = attribute_weights(model, batches(), metric=metric)
        expected = by_autograd(model, metric, list(found.scores))
    assert found.count == 6
    assert_close(found, expected)
    # All matrices of the layers are there; a router of a mixture is no projection.
    layers = {n for n, p in model.named_parameters() if p.dim() > 1 and ".embed" not in n}
    left_out = {n for n in layers - set(found.scores) if ".0." in n or ".1." in n}
    assert all(n.endswith(("gate.weight", "router.weight", "_bias")) for n in left_out)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# A router of this one has weights in float32, and InFloat64 gives it float64.
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [n for n in (*FAMILIES, *EXPERTS) if n != "hunyuan_v1_moe"])
def test_gradient_scores_of_every_architecture(name: str) -> None:
    model, data, chosen = build(name, dtype=torch.float64), batches(), "*"
    if name == "gemma3n":  # its own gradients are NaN where padding stands on the left
        data, chosen = [collate(part) for part in DATA], "*_proj.weight"
        with InFloat64(), pytest.raises(ValueError, match=r"modality_router.*runs twice"):
            attribute_weights(model, data)
    with InFloat64():
        found = attribute_weights(model, data, parameters=chosen)
        assert_close(found, by_autograd(model, "snip", list(found.scores)))


def inputs_by_hooks(model: PreTrainedModel, module: nn.Module, counted: str) -> list[Any]:
    """What a module is given at the tokens that count, row by row without padding."""
    found: list[Any] = []
    for ids, labels in (row for part in DATA for row in part):
        own = labels != IGNORED if counted == "labels" else torch.ones_like(ids, dtype=torch.bool)
        hook = module.register_forward_pre_hook(
            lambda _, args, own=own: found.append([each.flatten(0, -2)[own] for each in args])
        )
        with torch.no_grad():
            model(input_ids=ids[None])
        hook.remove()
    return found


def wanda_by_hand(model: PreTrainedModel, param: str, counted: str) -> Tensor:
    owner, leaf = model.get_submodule(param.rpartition(".")[0]), param.rpartition(".")[2]
    weight = model.get_parameter(param).detach()
    if leaf == "weight":
        x = torch.cat([args[0] for args in inputs_by_hooks(model, owner, counted)])
        norms = x.square().sum(0).sqrt()  # [in]
        return weight.abs() * (norms[:, None] if type(owner).__name__ == "Conv1D" else norms)
    squares = torch.zeros(len(weight), weight.shape[-1], dtype=torch.float64)  # [experts, in]
    for hidden, chosen, _ in inputs_by_hooks(model, owner, counted):
        for x, experts in zip(hidden, chosen.tolist(), strict=True):
            for expert in experts:
                gate, up = (owner.gate_up_proj[expert].detach() @ x).chunk(2)
                entered = nn.functional.silu(gate) * up if leaf == "down_proj" else x
                squares[expert] += entered.square()
    return weight.abs() * squares.sqrt()[:, None, :]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llama", "labels"), ("gpt2", "all"), ("mixtral", "labels"), ("gemma3", "all")],
)
def test_wanda_is_the_norm_of_what_enters(name: str, tokens: str) -> None:
    model = build(name, dtype=torch.float64)
    with InFloat64():
        found = attribute_weights(model, batches(), metric="wanda", tokens=tokens)
        expected = {param: wanda_by_hand(model, param, tokens) for param in found.scores}
    assert_close(found, expected)
    magnitudes = attribute_weights(model, metric="magnitude")
    assert_close(magnitudes, {p: model.get_parameter(p).detach().abs() for p in found.scores})


@pytest.mark.parametrize("metric", ["snip", "wanda"])
def test_batching_order_and_padding_change_nothing(metric: str) -> None:
    model = build("mixtral", dtype=torch.float64)
    data = [row for part in DATA for row in part]
    with InFloat64():
        found = attribute_weights(model, batches(), metric=metric)
        alone = attribute_weights(model, [collate([row]) for row in reversed(data)], metric=metric)
        # Two texts in one row, the second of which begins at position 0 again.
        (first, own), (second, other) = data[0], data[1]
        packed = {
            "input_ids": torch.cat([first, second])[None],
            "labels": torch.cat([own, other])[None],
            "position_ids": torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None],
        }
        in_one_row = attribute_weights(
            model, [packed, *(collate([row]) for row in data[2:])], metric=metric
        )
    assert found.data_fingerprint == alone.data_fingerprint
    assert found.count == alone.count == in_one_row.count
    for other_way in (alone, in_one_row):
        assert_close(other_way, {param: score.double() for param, score in found.scores.items()})


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_recomputed_activations_count_once(name: str) -> None:
    expected = attribute_weights(build(name), batches())
    model = build(name)
    for layer in model.base_model.layers:
        own = layer.forward
        layer.forward = lambda *args, own=own, **kwargs: checkpoint(
            lambda *x: own(*x, **kwargs), *args, use_reentrant=False
        )
    found = attribute_weights(model, batches())
    assert all(
        torch.equal(found.scores[param], expected.scores[param]) for param in expected.scores
    )


@pytest.mark.parametrize("metric", ["snip", "wanda", "magnitude"])
def test_scores_in_a_folder_are_those_in_memory(metric: str, tmp_path: Path) -> None:
    model = build("gpt2")
    loader = None if metric == "magnitude" else batches()
    expected = attribute_weights(model, loader, metric=metric)
    found = attribute_weights(model, loader, metric=metric, out=tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name[0] != ".") == [
        ".json",
        ".safetensors",
    ]
    expected.save(tmp_path / "saved")
    for each in (found, WeightAttribution.load(tmp_path / "saved", model)):
        assert list(each.scores) == list(expected.scores)
        for param, score in expected.scores.items():
            assert score.dtype == torch.float32
            assert torch.equal(each.scores[param], score)
        for field in ("metric", "tokens", "count", "transposed", "weights_hash", "units_hash"):
            assert getattr(each, field) == getattr(expected, field)
        assert each.data_fingerprint == expected.data_fingerprint
    with pytest.raises(ValueError, match=r"weight attribution was made on"):
        WeightAttribution.load(tmp_path, build("llama"))


def test_a_folder_that_is_damaged_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    attribute_weights(model, metric="magnitude", out=tmp_path / "scores")
    (file,) = (tmp_path / "scores").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged"):
        WeightAttribution.load(tmp_path / "scores")
    ssah.attribute(model, batches()).save(tmp_path / "units")
    with pytest.raises(ValueError, match=r"holds 'attribution'"):
        attribute_weights(model, batches(), out=tmp_path / "units")


def test_patterns_choose_parameters() -> None:
    model, whole = build("llama"), attribute_weights(build("llama"), batches())
    some = attribute_weights(model, batches(), parameters=["*.1.mlp.*", "*q_proj*"])
    assert list(some.scores) == [p for p in whole.scores if ".1.mlp." in p or "q_proj" in p]
    assert all(torch.equal(score, whole.scores[param]) for param, score in some.scores.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "variance"}, r"metric is 'variance'"),
        ({"metric": "magnitude"}, r"magnitudes take no data"),
        ({"tokens": "labels"}, r"tokens is 'labels'; it must be 'auto' for 'snip'"),
        ({"parameters": "*.norm.*"}, r"parameters has '\*\.norm\.\*', which matches none"),
        ({"parameters": []}, r"parameters is empty"),
        ({"resume_dir": "there"}, r"resume_dir is 'there'; it must be None for 'snip'"),
        ({"save_every_seconds": -1}, r"save_every_seconds is -1"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_weights(build("llama"), batches(), **options)
    with pytest.raises(ValueError, match=r"loader is None and metric is 'snip'"):
        attribute_weights(build("llama"))


def test_what_is_not_finite_or_not_to_be_predicted_is_refused() -> None:
    model = build("llama")
    silent = collate(DATA[0])
    silent["labels"][:] = IGNORED
    silent["labels"][:, 0] = 5  # counted, but nothing comes before it
    with pytest.raises(ValueError, match=r"no token to predict"):
        attribute_weights(model, [silent])
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = torch.inf
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        attribute_weights(model, batches())


@pytest.mark.parametrize("metric", ["snip", "wanda", "magnitude"])
def test_offloaded_weights_have_the_bits_of_those_in_memory(metric: str) -> None:
    loader = None if metric == "magnitude" else batches()
    for name in ("llama", "mixtral"):
        expected = attribute_weights(build(name), loader, metric=metric)
        model = build(name)
        cpu_offload(model, torch.device("cpu"))
        found = attribute_weights(model, loader, metric=metric)
        assert any(parameter.is_meta for parameter in model.parameters())
        assert list(found.scores) == list(expected.scores)
        assert all(torch.equal(found.scores[p], score) for p, score in expected.scores.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["snip", "fisher", "wanda"])
def test_low_precision_is_as_near_as_its_gradients(metric: str, dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    found = attribute_weights(model, batches(), metric=metric)
    expected = attribute_weights(model.double(), batches(), metric=metric)  # the same weights
    for param, score in expected.scores.items():
        assert found.scores[param].dtype == torch.float32
        assert float((found.scores[param] - score).norm() / score.norm()) < 0.05, param


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "of", classmethod(lambda cls: cls(0, 2)))
    with pytest.raises(ValueError, match=r"works in one process"):
        attribute_weights(build("llama"), batches())


def test_an_input_that_is_changed_after_it_was_read_is_refused() -> None:
    model = build("llama")
    mlp = model.get_submodule("model.layers.0.mlp")
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        out = own(x)
        x.zero_()  # nothing that autograd needs: weights take no gradient
        return out

    mlp.forward = forward
    with pytest.raises(RuntimeError, match=r"'model\.layers\.0\.mlp\..*changed in place"):
        attribute_weights(model, batches())


def test_sums_on_the_disk_leave_no_file(tmp_path: Path) -> None:
    sums = zeros_on_disk((3, 5), tmp_path)
    assert str(sums.untyped_storage().filename).startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())
    sums[1] += torch.arange(5)
    assert sums.sum() == 10
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        zeros_on_disk((2**30, 2**28), tmp_path)  # an exbibyte
    assert not list(tmp_path.iterdir())


def test_an_interrupted_pass_of_inputs_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def dying() -> Iterator[dict[str, Tensor]]:
        yield batches()[0]
        raise KeyboardInterrupt

    options: dict[str, Any] = {"metric": "wanda", "tokens": "labels"}
    kept = {"resume_dir": tmp_path, "save_every_seconds": 0.0}
    model = build("mixtral")
    expected = attribute_weights(model, batches(), **options)
    with pytest.raises(KeyboardInterrupt):
        attribute_weights(model, dying(), **options, **kept)
    ran: list[int] = []
    hook = model.base_model.register_forward_pre_hook(lambda *_: ran.append(1))
    found = attribute_weights(model, batches(), **options, **kept)
    hook.remove()
    assert len(ran) == 1  # the second batch alone
    assert found.count == expected.count
    assert found.data_fingerprint == expected.data_fingerprint
    assert all(torch.equal(found.scores[p], score) for p, score in expected.scores.items())
    with pytest.raises(ValueError, match=r"has an unfinished run with parameters"):
        attribute_weights(model, batches(), **options, **kept, parameters="*.self_attn.*")
