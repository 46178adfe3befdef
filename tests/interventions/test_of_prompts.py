"""Changes that depend on the prompts, and changes within a layer, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ablatable import assert_same_bits, bits
from tiny_models import build, collate, rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah import intervene
from ssah.evaluation.generating.decoding import decode, greedy
from ssah.evaluation.measures.continuations import continuation_log_probs
from ssah.interventions import Add, ProjectOut, PromptEnds, Prompts, ScaleHidden, Zero
from ssah.units import find_modules

HIDDEN = 48
V = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))


def batch(side: str = "left", lengths: tuple[int, ...] = (9, 4, 7)) -> dict[str, Tensor]:
    return collate(rows(lengths), side=side, labels=False)


def logits(model: PreTrainedModel, data: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(batch() if data is None else data)).logits


@contextmanager
def hooked(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


class Sums:
    """Strength and beginning of a row, from its tokens and from a pass of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def strength(self, given: Prompts) -> Tensor:
        self.calls += 1
        own = given.input_ids.double().masked_fill(~given.attended, 0).sum(1)
        # Unchanged: whatever is under way, the model itself answers.
        plain = given.model(input_ids=given.input_ids, attention_mask=given.attended.long()).logits
        return (own % 3 - 1) * plain[:, -1, 0].double().abs()

    def begins(self, given: Prompts) -> Tensor:
        return given.attended.sum(1) - 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_strength_and_beginning_are_of_the_prompts_themselves(name: str, side: str) -> None:
    model, sums = build(name, dtype=torch.float64), Sums()
    before, data = bits(model), batch(side)
    plain = logits(model, data)
    layer = next(m for n, m in model.named_modules() if n.endswith(("layers.1", "h.1")))
    own = [
        int(data["input_ids"][row][data["attention_mask"][row].bool()].sum()) for row in range(3)
    ]
    strengths = [(own[row] % 3 - 1) * abs(float(plain[row, -1, 0])) for row in range(3)]

    def steer(h: Tensor) -> Tensor:
        h = h.clone()
        for row in range(3):
            places = data["attention_mask"][row].nonzero()[:, 0].tolist()
            for place in places[len(places) - 2 :]:
                h[row, place] += strengths[row] * V.double()
        return h

    with hooked(layer, steer):
        expected = logits(model, data)
    change = Add([0, 1], torch.stack([0 * V, V]), at=sums.begins, rows=sums.strength)
    # What is changed outside does not count for the strength, and does for what runs.
    with intervene(model, ScaleHidden(0, 1.0, at="last")), intervene(model, change):
        found = logits(model, data)
    assert sums.calls == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert float((expected - plain).abs().max()) > 1e-3
    assert_same_bits(model, before)


def test_generation_goes_on_as_the_prompts_decided() -> None:
    model = build("llama", dtype=torch.float64)
    ends = PromptEnds((5, 6))
    prompts = [[3, 4, 5, 6], [7, 8, 9, 9, 9, 5, 6], [9, 9, 5, 6, 4]]
    # They begin alike, so that decoding would run the beginning once for all of them.
    prompts = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, *ids] for ids in prompts]

    def signs(given: Prompts) -> Tensor:
        requests = ends.prompts(given)
        return torch.tensor([(1.0 if len(ids) > 15 else -1.0) * bool(ids) for ids in requests])

    change = Add(1, 5 * V, at=ends, rows=signs)
    expected = []
    for ids, sign in zip(prompts, (-1, 1, -1), strict=True):
        text, end = list(ids), len(ids) - 1 - (ids[-1] == 4)
        for _ in range(12):

            def steer(h: Tensor, sign: int = sign, end: int = end) -> Tensor:
                h = h.clone()
                h[:, end:] += sign * 5 * V.double()
                return h

            with hooked(model.get_submodule("model.layers.1"), steer):
                text.append(int(logits(model, {"input_ids": torch.tensor([text])})[0, -1].argmax()))
        expected.append(text[len(ids) :])
    with intervene(model, change), greedy(model, _NoTokens(), [], 12):  # type: ignore[arg-type]
        assert decode(model, prompts, [], 12) == expected
        # A row that ends leaves the answers alone, and stays in the batch.
        stop = expected[1][1]
        cut = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in expected]
    with intervene(model, change), greedy(model, _NoTokens(), [stop], 12):  # type: ignore[arg-type]
        assert decode(model, prompts, [stop], 12) == cut
    with greedy(model, _NoTokens(), [], 12):  # type: ignore[arg-type]
        assert decode(model, prompts, [], 12) != expected


class _NoTokens:
    pad_token_id = 0
    eos_token_id = None
    bos_token_id = None


def test_answers_to_one_prompt_are_each_steered_as_by_themselves() -> None:
    model, ends = build("llama", dtype=torch.float64), PromptEnds((5, 6))
    prompts, said = [[3, 9, 5, 6]] * 2 + [[4, 4, 9, 5, 6]], [[7, 8], [9], [7, 8]]

    def log_probs(own: list[int]) -> Tensor:
        return continuation_log_probs(
            model,
            _NoTokens(),  # type: ignore[arg-type]
            [prompts[i] for i in own],
            [said[i] for i in own],
            8,
        )

    with intervene(model, Add(1, 5 * V, at=ends)):
        # Together, equal prompts would go on from one cache, which begins before the change.
        together = log_probs([0, 1, 2])
        apart = torch.cat([log_probs([number]) for number in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(together, log_probs([0, 1, 2]))


def test_prompts_end_where_the_template_says() -> None:
    ends = PromptEnds.of([[1, 2, 8, 9], [1, 3, 3, 8, 9]])
    assert ends.tokens == (8, 9)
    ids = torch.tensor([[0, 0, 4, 8, 9], [8, 9, 3, 8, 9], [5, 8, 9, 7, 7], [8, 8, 8, 8, 8]])
    given = Prompts(build("llama"), ids, ids != 0)
    assert ends.places(given).tolist() == [4, 4, 2, -1]
    assert ends(given).tolist() == [2, 4, 2, 0]
    assert ends.prompts(given) == [[4, 8, 9], [8, 9, 3, 8, 9], [5, 8, 9], []]
    short = Prompts(given.model, ids[:, :1], given.attended[:, :1])
    assert ends.prompts(short) == [[], [], [], []]
    with pytest.raises(ValueError, match="prompts end with different tokens"):
        PromptEnds.of([[1, 2], [1, 3]])


def test_what_cannot_be_asked_is_refused() -> None:
    model, data = build("llama"), batch()
    plain = logits(model)
    for function, message in (
        (lambda given: torch.ones(2), r"gives torch.float32 \[2\] for 3 prompts"),
        (lambda given: torch.full((3,), float("nan")), "must give one finite number for each"),
    ):
        with pytest.raises(ValueError, match=message), intervene(model, Add(0, V, rows=function)):
            logits(model)
    assert torch.equal(logits(model), plain)
    ones = Add(0, V, rows=lambda given: torch.ones(len(given.input_ids)))
    embedded = model.get_input_embeddings()(data["input_ids"]).detach()
    with pytest.raises(ValueError, match="has inputs_embeds alone"), intervene(model, ones):
        model(inputs_embeds=embedded)
    with torch.no_grad():
        past = model(**data, use_cache=True).past_key_values
    step = {"input_ids": data["input_ids"][:, :1], "past_key_values": past}
    with pytest.raises(ValueError, match="goes on from a cache of them"), intervene(model, ones):
        model(**step)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("site", ["attention", "ffn", "input"])
def test_a_site_is_a_part_of_a_layer(name: str, site: Any) -> None:
    model = build(name, dtype=torch.float64)
    before, u = bits(model), V.double() / V.double().norm()

    def away(h: Tensor) -> Tensor:
        return h - torch.einsum("...d,d,e->...e", h, u, u)

    layers = [m for n, m in model.named_modules() if n.endswith(("layers.0", "h.0"))]
    if site == "input":
        embedding = model.transformer.drop if name == "gpt2" else model.get_input_embeddings()
        where: nn.Module = embedding
    else:
        parts = {"attention": ("self_attn", "attn"), "ffn": ("mlp", "block_sparse_moe")}[site]
        where = next(m for n, m in layers[0].named_children() if n in parts)
    with hooked(where, away):
        expected = logits(model)
    with intervene(model, ProjectOut(0, V, site=site)):
        found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(found, logits(model))
    # For some rows alone: experts are given the tokens of all rows one after the other.
    with intervene(model, ProjectOut(0, V, site=site, rows=[0.0, 1.0, 0.0])):
        some = logits(model)
    mixed = torch.stack([logits(model)[0], expected[1], logits(model)[2]])
    torch.testing.assert_close(some, mixed, rtol=1e-9, atol=1e-11)
    assert_same_bits(model, before)


def test_a_site_that_is_missing_or_in_parts_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="site is 'block'; it must be one of output, input"):
        intervene(model, Add(0, V, site="block"))  # type: ignore[arg-type]
    shared = build("deepseek_v3")
    parts = {each.down for each in find_modules(shared).values() if "layers.1.mlp" in each.name}
    assert len(parts) == 2
    with pytest.raises(ValueError, match=r"which layer 1 has in 2 parts \(experts\)"):
        intervene(shared, Add(1, V, site="ffn"))
    with intervene(shared, ProjectOut(1, V, site="ffn"), Zero("model.norm.weight")):
        logits(shared)
