"""attribute() against a float64 computation from activations captured by plain hooks.

`family_checks.py` compares every family.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scores import TOLERANCE, Batches, assert_close, capture, expected, ragged
from tiny_models import IGNORED, LENGTHS, build, collate, rows
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ssah.attribution import METRICS, attribute, forward_backward
from ssah.units import find_modules


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize(
    ("side", "labels", "tokens"),
    [("left", True, "labels"), ("left", False, "all"), ("right", True, "all")],
)
def test_padding_and_tokens(name: str, metric: str, side: str, labels: bool, tokens: str) -> None:
    model = build(name)
    batches = ragged(side, labels)
    result = attribute(model, batches, metric=metric, tokens=tokens)
    assert_close(result, *expected(model, batches, metric, tokens), 1e-4)
    total = sum(LENGTHS) + 29
    if tokens == "all":
        assert set(result.count.values()) == {total}


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        # Architectures differ in what they compute, metrics in what is summed of it.
        pytest.param(
            name,
            metric,
            marks=[] if name == "llama" or metric == METRICS[0] else pytest.mark.exhaustive,
        )
        for name in ("llama", "gemma3", "phi3", "gpt2")
        for metric in METRICS
    ],
)
def test_bfloat16(name: str, metric: str) -> None:
    """Fused and eager products round differently: over many tokens the differences average out."""
    model = build(name, dtype=torch.bfloat16)
    batches = [collate(rows((48,) * 8, seed=seed)) for seed in range(8)]
    result = attribute(model, batches, metric=metric)
    assert_close(result, *expected(model, batches, metric, "labels"), TOLERANCE[torch.bfloat16])


def test_mean_and_variance_come_with_every_metric() -> None:
    model = build("llama")
    name = "model.layers.1.mlp.down_proj"
    seen = [capture(model, b, False)[0][name][b["attention_mask"].bool()] for b in ragged()]
    x = torch.cat(seen)
    for metric in METRICS:
        result = attribute(model, ragged(), metric=metric, tokens="all")
        torch.testing.assert_close(result.mean[name], x.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.variance[name], x.var(0), rtol=1e-4, atol=1e-6)
        assert result.count[name] == len(x)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_batching_changes_nothing(name: str, metric: str) -> None:
    model = build(name)
    data = rows((11, 4, 9, 7, 10, 3))
    together = attribute(model, [collate(data)], metric=metric)
    for size in (1, 4):
        parts = [collate(data[i : i + size]) for i in range(0, len(data), size)]
        apart = attribute(model, parts, metric=metric)
        assert apart.data_fingerprint == together.data_fingerprint
        for key, score in together.scores.items():
            assert (apart.scores[key] - score).norm() <= 1e-5 * score.norm()


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("metric", METRICS)
def test_one_kind_of_module_alone(kind: str, metric: str) -> None:
    model = build("llama")
    whole = attribute(model, ragged(), metric=metric)
    part = attribute(model, ragged(), metric=metric, modules=(kind,))
    assert list(part.scores) == [key for key in whole.scores if (kind == "mlp") == ("mlp" in key)]
    for key, score in part.scores.items():
        assert (whole.scores[key] - score).norm() <= 1e-5 * score.norm()


# What the backbone is given


def seen_by_backbone(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    hook = model.base_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True
    )
    attribute(model, [batch])
    hook.remove()
    return seen


def test_the_mask_is_dropped_only_where_nothing_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    right, left = collate(rows()), collate(rows(), side="left")
    seen = seen_by_backbone(model, right)
    assert seen.keys() == {"input_ids", "use_cache"}
    assert seen["use_cache"] is False
    assert torch.equal(seen_by_backbone(model, left)["attention_mask"], left["attention_mask"])
    holes = {**right, "attention_mask": right["attention_mask"].clone()}
    holes["attention_mask"][0, 2] = 0
    assert torch.equal(seen_by_backbone(model, holes)["attention_mask"], holes["attention_mask"])
    positions = {**right, "position_ids": torch.arange(11).expand(4, 11)}
    seen = seen_by_backbone(model, positions)
    assert torch.equal(seen["attention_mask"], right["attention_mask"])
    assert torch.equal(seen["position_ids"], positions["position_ids"])
    model.config.is_causal = False
    assert "attention_mask" in seen_by_backbone(model, right)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_prepared_4d_mask_is_passed_on(dtype: torch.dtype) -> None:
    model = build("llama")
    batch = collate(rows(), side="left")
    allowed = (
        torch.ones(11, 11, dtype=torch.bool).tril()[None] & batch["attention_mask"].bool()[:, None]
    )
    mask = allowed[:, None]
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    seen = seen_by_backbone(model, {**batch, "attention_mask": mask})
    assert torch.equal(seen["attention_mask"], mask)
    four, two = (
        attribute(model, [{**batch, "attention_mask": m}], tokens="all")
        for m in (mask, batch["attention_mask"])
    )
    assert four.count == two.count
    for key, score in two.scores.items():
        torch.testing.assert_close(four.scores[key], score, rtol=1e-4, atol=1e-9)


def test_no_projection_to_the_vocabulary_for_activation_metrics() -> None:
    model = build("llama")
    model.lm_head = nn.Identity()
    attribute(model, ragged())


def test_the_last_projection_is_spared_where_nothing_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    ran: list[str] = []
    names = {module.down: name for name, module in find_modules(model).items()}
    linear = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if self in names:
            ran.append(names[self])
        return linear(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)  # a hook on B would be a reader
    attribute(model, ragged()[:1])
    assert ran == list(find_modules(model))[:-1]
    ran.clear()
    attribute(model, ragged()[:1], metric="taylor")
    assert ran == list(find_modules(model))


def test_logits_exist_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2")
    whole = attribute(model, ragged(), metric="taylor")
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel() // 128))
    monkeypatch.setattr(forward_backward, "_LOGITS_AT_ONCE", 5 * 128)
    chunked = attribute(model, ragged(), metric="taylor")
    predicted = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in ragged())
    assert max(sizes) <= 5
    assert sum(sizes) == predicted
    for key, score in whole.scores.items():
        torch.testing.assert_close(chunked.scores[key], score, rtol=1e-4, atol=1e-6)


# Nothing stays behind


class Boom(Exception):
    pass


def failing(batches: Batches) -> Iterator[dict[str, Tensor]]:
    yield from batches
    raise Boom


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "training": {name: m.training for name, m in model.named_modules()},
        "attributes": {name: set(vars(m)) for name, m in model.named_modules()},
        "hooks": {
            name: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for name, m in model.named_modules()
        },
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "values": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def assert_untouched(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = state_of(model)
    for name, value in before.pop("values").items():
        assert torch.equal(after["values"][name], value)
    for name, grad in before.pop("grad").items():
        assert after["grad"][name] is grad
    after.pop("values"), after.pop("grad")
    assert after == before


@pytest.mark.parametrize("metric", ["variance", "taylor"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_everything_is_as_it_was(name: str, metric: str) -> None:
    model = build(name)
    quiet = attribute(model, ragged(), metric=metric)
    model.train()
    frozen, kept = list(model.parameters())[3:5]
    frozen.requires_grad_(False)
    kept.grad = torch.ones_like(kept)
    next(iter(find_modules(model).values())).down.eval()
    before = state_of(model)
    rng = torch.random.get_rng_state()
    result = attribute(model, ragged(), metric=metric)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert_untouched(model, dict(before))
    for key, score in quiet.scores.items():
        assert torch.equal(result.scores[key], score)
    with pytest.raises(Boom):
        attribute(model, failing(ragged()), metric=metric)
    assert_untouched(model, dict(before))


@pytest.mark.parametrize("metric", ["variance", "taylor"])
def test_a_failure_inside_the_model_restores_everything(metric: str) -> None:
    model = build("llama").train()

    def fail(*_: Any) -> None:
        raise Boom

    where = (model.model.norm, model.lm_head) if metric == "taylor" else (model.model.norm,)
    for module in where:
        hook = module.register_forward_pre_hook(fail)
        before = state_of(model)
        with pytest.raises(Boom):
            attribute(model, ragged(), metric=metric)
        assert_untouched(model, before)
        hook.remove()


def test_no_parameter_ever_gets_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").train()
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: fired.append(name))
    attribute(model, ragged(), metric="fisher")
    assert fired == []
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("metric", METRICS)
def test_grad_mode_of_the_caller_does_not_matter(metric: str, mode: Any) -> None:
    model = build("llama")
    plain = attribute(model, ragged(), metric=metric)
    with mode():
        result = attribute(model, ragged(), metric=metric)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = attribute(model, ragged(), metric=metric)
    for key, score in plain.scores.items():
        assert torch.equal(result.scores[key], score)
        assert torch.equal(automatic.scores[key], score)


def test_a_forward_that_someone_else_replaced_is_used() -> None:
    model = build("llama")
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(0.5 * x)
    result = attribute(model, ragged())
    assert_close(result, *expected(model, ragged(), "variance", "labels"), 1e-4)
    assert "forward" in vars(mlp)


def test_an_unknown_activation_is_scored_through_its_own_code() -> None:
    model = build("llama")
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    for metric in METRICS:
        result = attribute(model, ragged(), metric=metric)
        assert_close(result, *expected(model, ragged(), metric, "labels"), 1e-4)


# Errors


def test_masked_nan_does_nothing_and_unmasked_nan_is_named() -> None:
    model = build("llama")
    batch = collate(rows())
    plain = attribute(model, [batch])
    padding = ~batch["attention_mask"].bool()
    norm = model.model.layers[1].post_attention_layernorm
    hook = norm.register_forward_hook(
        lambda _m, _a, out: out.masked_fill(padding[..., None], float("nan"))
    )
    masked = attribute(model, [batch])
    hook.remove()
    for key, score in plain.scores.items():
        assert torch.equal(masked.scores[key], score)
    for parameter, name in (
        ("layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
        ("layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"),
    ):
        for bad in (float("nan"), float("inf")):
            broken = build("llama")
            with torch.no_grad():
                broken.model.get_submodule(parameter).weight[3, 1] = bad
            for metric in ("variance", "fisher"):
                with pytest.raises(FloatingPointError, match=f"that enter '{name}' are NaN"):
                    attribute(broken, [batch], metric=metric)


def test_bad_gradients_and_weights_are_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    attribute(model, ragged())
    with pytest.raises(FloatingPointError, match=r"input of 'model.layers.1.mlp.down_proj'"):
        attribute(model, ragged(), metric="taylor")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"weight of 'model.layers.1.mlp.down_proj'"):
        attribute(model, ragged(), metric="norm")


def test_far_means_do_not_hurt_the_variance() -> None:
    """Mean / deviation = 1e4 in float32: within 1e-4 of float64."""
    model = build("gpt2")
    layer = model.transformer.h[1].mlp
    noise = torch.randn(4, 11, layer.c_fc.nf, generator=torch.Generator().manual_seed(0)) + 1e4
    layer.act.register_forward_hook(lambda *_: noise)
    name = "transformer.h.1.mlp.c_proj"
    batch = collate(rows((11,) * 4), labels=False)
    exact = noise.double().flatten(0, 1).var(0)
    torch.testing.assert_close(attribute(model, [batch]).variance[name], exact, rtol=1e-4, atol=0)


def test_a_model_without_a_head() -> None:
    model = build("llama")
    backbone = AutoModel.from_config(model.config)
    backbone.load_state_dict(model.model.state_dict())
    result = attribute(backbone, ragged())
    for key, score in attribute(model, ragged()).scores.items():
        assert torch.equal(result.scores[key.removeprefix("model.")], score)
    with pytest.raises(ValueError, match="no vocabulary projection"):
        attribute(backbone, ragged(), metric="fisher")


def test_progress_shows_tokens_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    attribute(build("llama"), iter(ragged()), progress=True)
    shown = capsys.readouterr().err
    assert "tokens/s" in shown
    assert "2/2" in shown
