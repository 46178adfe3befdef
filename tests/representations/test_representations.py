"""Reduced hidden states equal those of every row by itself, copied by hooks, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ranks as processes
import torch
from ablatable import assert_same_bits, bits
from tiny_models import EXPERTS, FAMILIES, IGNORED, build, collate, rows
from torch import Tensor, nn
from transformers import PreTrainedModel

import ssah
from ssah.distributed import deal
from ssah.interventions import Add, ProjectOut
from ssah.representations import (
    Representations,
    hidden_states,
    mean_difference,
    pair_cosines,
    represent,
    separation,
    top_tokens,
    vocabulary_projection,
)
from ssah.units import layers_path

POSITIONS = ("last", "first", "response", -2)
LENGTHS = (11, 5, 9, 7)
CHOSEN = ["llama", "gpt2", "mixtral", "gemma3"]
RIGHT_ALONE = ("bloom", "gemma2")  # in float64 they give NaN by themselves after padding
STREAMS = "gemma3n"  # its layers put out several streams
REST = sorted({*FAMILIES, *EXPERTS} - {*CHOSEN, STREAMS})  # `make test-all` has them
Row = tuple[Tensor, Tensor]


def layers_of(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(layers_path(model))


def states(model: PreTrainedModel, row: Row) -> dict[Any, Tensor]:
    """Of one row without padding: position -> [layers, hidden]."""
    ids, labels = row
    seen: list[Tensor] = []

    def copy(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].detach().clone())

    hooks = [layer.register_forward_hook(copy) for layer in layers_of(model).children()]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    h = torch.stack(seen).double()  # [layers, tokens, hidden]
    answer = [t for t in range(len(ids)) if labels[t] != IGNORED]
    first = answer[0]
    mean = sum(h[:, t] for t in answer) / len(answer)
    return {"last": h[:, first - 1], "first": h[:, first], "response": mean, -2: h[:, first - 2]}


def by_hand(model: PreTrainedModel, data: list[Row]) -> Tensor:
    """[rows, positions, layers, hidden]"""
    each = [states(model, row) for row in data]
    return torch.stack([torch.stack([row[p] for p in POSITIONS]) for row in each])


def of(h: Tensor) -> Representations:
    """The sums of states [rows, ...], written out."""
    n, mean = len(h), sum(h) / len(h)
    m2 = sum((row - mean) ** 2 for row in h)
    unit = sum(row / row.norm(dim=-1, keepdim=True) for row in h)
    return Representations(POSITIONS, n, mean, m2, unit)


@pytest.mark.parametrize(
    "name", [*CHOSEN, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in REST)]
)
def test_sums_are_those_of_each_row_by_itself(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before, data = bits(model), rows(LENGTHS)
    expected = of(by_hand(model, data))
    side = "right" if name in RIGHT_ALONE else "left"
    # Parts of some architectures compute in float32 whatever the model's dtype is.
    near = {"rtol": 1e-8, "atol": 1e-9} if name in CHOSEN else {"rtol": 1e-4, "atol": 3e-6}
    loaders = [
        [collate(data[:3], side=side), collate(data[3:])],
        [collate([data[i]]) for i in (2, 0, 3, 1)],  # another order, without padding
    ]
    for loader in loaders:
        found = represent(model, loader, positions=POSITIONS)
        assert (found.rows, found.positions) == (4, POSITIONS)
        for kind in ("mean", "m2", "unit_sum"):
            actual = getattr(found, kind)
            torch.testing.assert_close(actual, getattr(expected, kind), **near)
    torch.testing.assert_close(found.variance, by_hand(model, data).var(0), **near)
    assert_same_bits(model, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_states_of_each_row_come_a_batch_at_a_time() -> None:
    model = build("gpt2", dtype=torch.float64)
    data = rows(LENGTHS)
    loader = [collate(data[:3], side="left"), collate(data[3:])]
    found = list(hidden_states(model, loader, positions=POSITIONS))
    assert [len(each) for each in found] == [3, 1]
    torch.testing.assert_close(torch.cat(found), by_hand(model, data), rtol=1e-8, atol=1e-9)
    found[0][0] = 0  # they are the caller's
    with pytest.raises(ValueError, match="positions has 'middle'"):  # at once, not as it is read
        hidden_states(model, loader, positions="middle")  # type: ignore[arg-type]


def test_without_labels_a_row_is_a_prompt_and_interventions_count() -> None:
    model = build("llama", dtype=torch.float64)
    prompts = [(ids[:4], labels[:4]) for ids, labels in rows((9, 9))]
    batch = collate([*prompts, (prompts[0][0][:2], prompts[0][1][:2])], labels=False)
    plain = represent(model, [batch]).mean
    whole = represent(model, [collate(rows((9, 9)))])  # whose prompts have 4 tokens
    torch.testing.assert_close(represent(model, [collate(prompts, labels=False)]).mean, whole.mean)
    vector = torch.randn(48, dtype=torch.float64)
    with ssah.intervene(model, Add(1, vector)):
        moved = represent(model, [batch]).mean
    torch.testing.assert_close(moved[0, 0], plain[0, 0], rtol=0, atol=0)
    torch.testing.assert_close(moved[0, 1], plain[0, 1] + vector, rtol=1e-9, atol=1e-9)


def test_directions_are_what_interventions_take() -> None:
    model = build("gpt2", dtype=torch.float64)
    batches = [collate(rows((9, 5, 7), seed=seed)) for seed in (0, 1)]
    first, second = (represent(model, [batch]) for batch in batches)
    direction = mean_difference(first, second)[0]  # [layers, hidden]
    with ssah.intervene(model, ProjectOut(range(2), direction)):
        without = mean_difference(*(represent(model, [batch]) for batch in batches))[0]
    along = (without * direction).sum(-1).abs() / direction.square().sum(-1)
    assert float(along.max()) < 1e-12
    with ssah.intervene(model, Add(1, -direction[1])):
        moved = represent(model, batches[:1])
    torch.testing.assert_close(moved.mean[0, 1], second.mean[0, 1], rtol=1e-9, atol=1e-9)


def test_two_sets_are_compared_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (len(POSITIONS), 3, 6)
    a = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    b = torch.randn(5, *shape, generator=generator, dtype=torch.float64) + 0.7
    first, second = of(a), of(b)
    torch.testing.assert_close(mean_difference(first, second), a.mean(0) - b.mean(0))
    cosines, apart = pair_cosines(first, second), separation(first, second)
    assert apart.chance == pytest.approx(1 / 4 + 1 / 5)
    for at in ((0, 0), (2, 1)):
        x, y = (each[(slice(None), *at)] for each in (a, b))  # [rows, 6]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        def cosine(u: Tensor, v: Tensor) -> float:
            return float(u @ v) / math.sqrt(float(u @ u) * float(v @ v))

        own = [[(u, v) for u in s for v in s if u is not v] for s in (list(x), list(y))]
        both = [(u, v) for u in x for v in y]
        inside, other = (mean([cosine(*pair) for pair in pairs]) for pairs in own)
        across = mean([cosine(*pair) for pair in both])
        assert float(cosines.within[at]) == pytest.approx(inside)
        assert float(cosines.other[at]) == pytest.approx(other)
        assert float(cosines.between[at]) == pytest.approx(across)
        gap = math.acos(across) - math.acos(inside)
        assert float(cosines.gap[at]) == pytest.approx(gap)
        square = [mean([float((u - v) @ (u - v)) for u, v in pairs]) for pairs in (*own, both)]
        of_sets = [(square[2] - each) / max(square[2], each) for each in square[:2]]
        silhouette = (4 * of_sets[0] + 5 * of_sets[1]) / 9
        assert float(apart.silhouette[at]) == pytest.approx(silhouette)
        # Half the mean squared distance of pairs is the variance, over all channels.
        pooled = (3 * square[0] + 4 * square[1]) / 2 / 7
        difference = x.mean(0) - y.mean(0)
        assert float(apart.ratio[at]) == pytest.approx(float(difference @ difference) / pooled)


def test_sets_of_one_distribution_are_as_far_apart_as_chance_has_it() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios, silhouettes = [], []
    for _ in range(150):
        h = torch.randn(10, len(POSITIONS), 1, 20, generator=generator, dtype=torch.float64)
        found = separation(of(h[:4]), of(h[4:]))
        ratios.append(found.ratio)
        silhouettes.append(found.silhouette)
    assert float(torch.stack(ratios).mean()) == pytest.approx(found.chance, rel=0.05)
    assert abs(float(torch.stack(silhouettes).mean())) < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "cohere"])
def test_a_direction_passes_norm_and_head(name: str) -> None:
    model = build(name)
    before = bits(model)
    directions = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    norm = model.transformer.ln_f if name == "gpt2" else model.model.norm
    with torch.no_grad():
        expected = model.lm_head(norm(directions)).double()
    if name == "gemma2":
        expected = 3 * (expected / 3).tanh()
    if name == "cohere":
        expected = expected * 0.5
    found = vocabulary_projection(model, directions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    one = vocabulary_projection(model, directions[1])
    torch.testing.assert_close(one, found[1], rtol=1e-5, atol=1e-5)
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    "name", ["opt", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in REST)]
)
def test_the_last_state_of_a_prompt_gives_its_logits(name: str) -> None:
    model = build(name)
    prompt = collate(rows((6,)), labels=False)
    state = represent(model, [prompt]).mean[0, -1]  # [hidden]
    with torch.no_grad():
        logits = model(input_ids=prompt["input_ids"]).logits[0, -1].double()
    torch.testing.assert_close(vocabulary_projection(model, state), logits, rtol=1e-4, atol=1e-4)


def test_top_tokens_are_read() -> None:
    class Digits:
        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    model = build("llama")
    directions = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(directions))
    expected = [
        [f"<{i}>" for i in sorted(range(128), key=lambda i: -row[i])[:3]] for row in logits.tolist()
    ]
    assert top_tokens(model, Digits(), directions, k=3) == expected  # type: ignore[arg-type]


def several(rank: int, n: int, folder: Path) -> None:
    model = build("llama", dtype=torch.float64)
    batches = processes.batches(5)
    found = represent(model, deal(batches), positions=("last", "response"))
    torch.save(found, folder / f"{rank}.pt")
    few = represent(model, batches[:1] if rank else [], positions=("last", "response"))
    assert few.rows == 3
    with pytest.raises(ValueError, match="the same batches on all 2 ranks"):
        represent(model, batches)
    with pytest.raises(ValueError, match="positions is"):
        represent(model, deal(batches), positions=("last",) if rank else ("first",))
    with pytest.raises(ValueError, match="yielded no batch"):
        represent(model, [])


def test_ranks_join(tmp_path: Path) -> None:
    processes.start(several, 2, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    model = build("llama", dtype=torch.float64)
    one = represent(model, processes.batches(5), positions=("last", "response"))
    assert found[0].rows == found[1].rows == one.rows == 15
    for kind in ("mean", "m2", "unit_sum"):
        assert torch.equal(getattr(found[0], kind), getattr(found[1], kind))
        torch.testing.assert_close(getattr(found[0], kind), getattr(one, kind))


def test_what_cannot_be_reduced_is_refused() -> None:
    model = build("llama")
    batch = collate(rows((9, 5)))
    silent = {**batch, "labels": batch["labels"].clone()}
    silent["labels"][1] = IGNORED
    cases: list[tuple[Any, Any, str]] = [
        ([batch], ("middle",), "positions has 'middle'; it must have 'last'"),
        ([batch], (0,), "positions has 0; it must"),
        ([batch], ("last", -1), "it must have different ones"),
        ([batch], (), "at least one"),
        ([], ("last",), "loader yielded no batch"),
        ([silent], ("last",), "batch 0 has a row without a response token"),
        ([batch], (-3,), "positions has -3, but a row of batch 0 has a prompt of fewer tokens"),
        ([collate(rows((9,)), labels=False)], ("first",), "batch 0 has no labels"),
    ]
    for loader, positions, message in cases:
        with pytest.raises(ValueError, match=message):
            represent(model, loader, positions=positions)
    with pytest.raises(
        ValueError, match=r"puts out \[2, 2, 4, 48\]; must be \[rows, length, hidden"
    ):
        represent(build(STREAMS), [batch])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="hidden states of layer 1"):
        represent(model, [batch])
    with pytest.raises(ValueError, match=r"directions is \[3\]; it must be \[48\]"):
        vocabulary_projection(model, torch.zeros(3))
    zeros = torch.zeros(1, 2, 3, dtype=torch.float64)
    one, two = (Representations(("last",), n, zeros, zeros, zeros) for n in (1, 2))
    with pytest.raises(ValueError, match="each must have 2 at least"):
        pair_cosines(one, two)
    with pytest.raises(ValueError, match="of each set are alike at position 'last' of layer 0"):
        separation(two, two)
    other = Representations(("first",), 2, zeros, zeros, zeros)
    with pytest.raises(ValueError, match="they must be equal"):
        mean_difference(two, other)


@pytest.mark.parametrize("side", ["left", "right"])
def test_responses_do_not_run_for_the_states_of_prompts(side: str) -> None:
    model = build("llama", dtype=torch.float64)
    batch = collate(rows((12, 9, 6)), side=side)
    lengths: list[int] = []
    layer = model.get_submodule("model.layers.0")
    handle = layer.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    (found,) = hidden_states(model, [batch], positions=("last", "first"))
    (whole,) = hidden_states(model, [batch], positions=("last", "first", "response"))
    handle.remove()
    first = max(int((own != IGNORED).nonzero()[0]) for own in batch["labels"])
    assert lengths == [first + 1, 12]
    torch.testing.assert_close(found, whole[:, :2], rtol=1e-12, atol=1e-14)
