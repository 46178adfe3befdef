"""Heads and directions, against attention and states of one row at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ablatable import assert_same_bits, bits
from tiny_models import FAMILIES, IGNORED, build, collate, rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.interventions import ProjectOut, Zero
from ssah.methods import Changed, Edited, Inputs, method
from ssah.methods.batch_rows import part_of_each
from ssah.units import find_heads, find_modules, layers_path

SAFETY, UTILITY = rows((9, 7, 6), seed=1), rows((8, 10), seed=2)
MODELS = ["llama", "gpt2"]
Row = tuple[Tensor, Tensor]
Head = tuple[int, int]


def inputs(model: PreTrainedModel) -> Inputs:
    safety = [collate(SAFETY[:2], side="left"), collate(SAFETY[2:])]
    return Inputs(aligned=model, safety=safety, utility=[collate(UTILITY)])


def first_of(row: Row) -> int:
    """Where the first token of the response stands."""
    return next(t for t in range(len(row[0])) if row[1][t] != IGNORED)


def next_token(model: PreTrainedModel, row: Row) -> Tensor:
    with torch.no_grad():
        return model(row[0][None]).logits[0, first_of(row) - 1].log_softmax(-1)


def divergences(intact: list[Tensor], other: list[Tensor]) -> list[float]:
    """Of each row, by a loop over the vocabulary."""
    return [
        sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        for p, q in zip(intact, other, strict=True)
    ]


def divergence(intact: list[Tensor], other: list[Tensor]) -> float:
    return sum(divergences(intact, other)) / len(intact)


@contextmanager
def without(model: PreTrainedModel, heads: list[Head], *, mean: bool) -> Iterator[None]:
    """What heads put into O is the mean of the values so far, or 0."""
    handles = []
    for layer, own in find_heads(model).items():
        chosen = [head for at, head in heads if at == layer]
        down = model.get_submodule(own.name)
        attention = own.name.rpartition(".")[0]
        values: list[Tensor] = []
        if hasattr(model, "transformer"):
            source = model.get_submodule(f"{attention}.c_attn")
        else:
            source = model.get_submodule(f"{attention}.v_proj")

        def keep(_: nn.Module, __: Any, output: Tensor, values: list[Tensor] = values) -> None:
            n = output.shape[-1] // 3 if hasattr(model, "transformer") else output.shape[-1]
            values[:] = [output[..., -n:]]

        def change(
            _: nn.Module,
            args: Any,
            values: list[Tensor] = values,
            chosen: list[int] = chosen,
            n: int = own.n_heads,
            shared: int = own.n_heads // own.n_kv_heads,
        ) -> tuple[Tensor]:
            x = args[0].unflatten(-1, (n, -1)).clone()  # [rows, tokens, heads, channels]
            v = values[0].unflatten(-1, (n // shared, -1))
            for head in chosen:
                for t in range(x.shape[1]):
                    so_far = v[:, : t + 1, head // shared].mean(1)
                    x[:, t, head] = so_far if mean else 0 * so_far
            return (x.flatten(-2),)

        handles += [source.register_forward_hook(keep), down.register_forward_pre_hook(change)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


EVERY = [(layer, head) for layer in range(2) for head in range(4)]


@pytest.mark.parametrize("name", [*MODELS, "qwen3"])  # one with norms of queries
@pytest.mark.parametrize("out", ["undifferentiated", "scaled"])
def test_ships_is_the_divergence_without_a_head(name: str, out: Any) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    ships: Any = method("ships", out=out, n_heads=2)
    effects = ships.effects(inputs(model))
    intact = [next_token(model, row) for row in SAFETY]
    expected = {}
    for head in EVERY:
        with without(model, [head], mean=out == "undifferentiated"):
            expected[head] = divergences(intact, [next_token(model, row) for row in SAFETY])
    assert effects.keys() == expected.keys()
    for head, values in expected.items():
        assert effects[head].tolist() == pytest.approx(values, rel=1e-7, abs=1e-12)
    best = sorted(EVERY, key=lambda head: -sum(expected[head]))[:2]
    found = ships.find(inputs(model))
    assert found.facts["heads"] == [list(head) for head in best]
    # Both at once, and then as many others.
    for each, heads in ((found, best), (found.control(1), None)):
        with each.on(model):
            changed = [next_token(model, row) for row in SAFETY]
        if heads is not None:
            with without(model, heads, mean=out == "undifferentiated"):
                expected_rows = [next_token(model, row) for row in SAFETY]
            torch.testing.assert_close(changed, expected_rows, rtol=1e-8, atol=1e-10)
        else:
            assert divergence(intact, changed) > 0
    assert_same_bits(model, before)


def test_heads_may_be_those_that_most_requests_have_among_their_best() -> None:
    votes: Any = method("ships", n_heads=2, by="votes")
    model = build("llama", dtype=torch.float64)
    # Three requests of four agree on heads whose mean is small; the fourth one is loud.
    table = {head: torch.tensor([0.0, 0.0, 0.0, float(n)]) for n, head in enumerate(EVERY)}
    table[1, 1] = torch.tensor([0.5, 0.4, 0.1, 0.0])
    table[0, 2] = torch.tensor([0.4, 0.5, 0.2, 0.0])
    given = inputs(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(votes), "effects", lambda *_: table)
        assert votes.find(given).facts["heads"] == [[0, 2], [1, 1]]
        loud = method("ships", n_heads=2).find(given).facts["heads"]
        assert loud == [[1, 3], [1, 2]]


def test_controls_of_heads_are_as_many_heads() -> None:
    model = build("llama", dtype=torch.float64)
    found = method("ships", out="scaled", n_heads=3).find(inputs(model))
    assert isinstance(found, Changed)
    drawn = []
    for seed in range(6):
        (zero,) = found.control(seed).changes
        assert isinstance(zero, Zero)
        drawn.append(zero.selection)
        assert len(zero.selection) == 3 * 12
    assert any(each != drawn[0] for each in drawn)
    with pytest.raises(ValueError, match="n_heads is 9; the model has 8 heads"):
        method("ships", n_heads=9).find(inputs(model))
    with pytest.raises(ValueError, match="n_heads is 9; the model has 8 heads"):
        method("sahara", n_heads=9).find(inputs(model))


def last_states(model: PreTrainedModel) -> Tensor:
    """What the last layer puts out at the last token of each request, ``[rows, hidden]``."""
    seen: list[Tensor] = []
    layer = list(model.get_submodule(layers_path(model)).children())[-1]

    def copy(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].detach())

    handle = layer.register_forward_hook(copy)
    for row in SAFETY:
        next_token(model, row)
    handle.remove()
    return torch.stack([h[first_of(row) - 1] for h, row in zip(seen, SAFETY, strict=True)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("out", "rank"), [("undifferentiated", 1), ("scaled", 1), ("scaled", 2)])
def test_sahara_joins_the_head_that_turns_most(name: str, out: Any, rank: int) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    intact = torch.linalg.svd(last_states(model)).U[:, :rank]
    chosen: list[Head] = []
    turned = []
    for _ in range(2):
        angles = {}
        for head in EVERY:
            if head not in chosen:
                with without(model, [*chosen, head], mean=out == "undifferentiated"):
                    other = torch.linalg.svd(last_states(model)).U[:, :rank]
                cosines = torch.linalg.svdvals(intact.T @ other).clamp(max=1)
                angles[head] = sum(math.acos(float(each)) for each in cosines)
        chosen.append(max(angles, key=lambda head: angles[head]))
        turned.append(angles[chosen[-1]])
    found = method("sahara", out=out, n_heads=2, rank=rank).find(inputs(model))
    assert found.facts["heads"] == [list(head) for head in chosen]
    assert found.facts["effect"] == pytest.approx(turned, rel=1e-6)
    with without(model, chosen, mean=out == "undifferentiated"):
        expected = [next_token(model, row) for row in SAFETY]
    with found.on(model):  # type: ignore[union-attr]
        changed = [next_token(model, row) for row in SAFETY]
    torch.testing.assert_close(changed, expected, rtol=1e-8, atol=1e-10)
    assert_same_bits(model, before)


def states_of(model: PreTrainedModel, row: Row, back: int) -> Tensor:
    """``[layers, hidden]`` at the token ``back`` from the end of the prompt."""
    seen: list[Tensor] = []

    def copy(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].detach())

    layers = list(model.get_submodule(layers_path(model)).children())
    handles = [layer.register_forward_hook(copy) for layer in layers]
    next_token(model, row)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)[:, first_of(row) + back]


@contextmanager
def projected(model: PreTrainedModel, direction: Tensor) -> Iterator[None]:
    """Without the direction in what is embedded, in attention, in FFNs and in what layers give."""
    u = direction / direction.norm()

    def change(_: nn.Module, __: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h = h - torch.einsum("btd,d,e->bte", h, u, u)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    layers = list(model.get_submodule(layers_path(model)).children())
    inside = [m for layer in layers for n, m in layer.named_children() if n in PARTS]
    embedded = model.transformer.drop if hasattr(model, "transformer") else model.model.embed_tokens
    handles = [each.register_forward_hook(change) for each in (embedded, *inside, *layers)]
    yield
    for handle in handles:
        handle.remove()


PARTS = ("self_attn", "attn", "mlp")
REQUESTS, ORDINARY = rows((9, 7, 6, 8, 5, 10), seed=1), rows((8, 10, 6, 7, 9), seed=2)


def directed(model: PreTrainedModel) -> Inputs:
    safety = [collate(REQUESTS[:2], side="left"), collate(REQUESTS[2:])]
    return Inputs(aligned=model, safety=safety, utility=[collate(ORDINARY)])


def refused(model: PreTrainedModel, data: list[Row] = SAFETY) -> float:
    """Mean log-probability of the refusals."""
    total = 0.0
    for ids, labels in data:
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        total += sum(float(log_p[t - 1, ids[t]]) for t in range(len(ids)) if labels[t] != IGNORED)
    return total / len(data)


def odds(model: PreTrainedModel, data: list[Row], tokens: set[int]) -> float:
    """Mean log-odds of a first token that is one of some."""
    total = 0.0
    for row in data:
        p = next_token(model, row).exp().tolist()
        inside = sum(p[token] for token in tokens)
        total += math.log(inside) - math.log(1 - inside)
    return total / len(data)


def parts(data: list[Row]) -> tuple[list[Row], list[Row]]:
    part = part_of_each(len(data), (0.6, 0.4), 0).tolist()
    kept, held = ([row for row, own in zip(data, part, strict=True) if own == n] for n in (0, 1))
    return kept, held


@contextmanager
def added(model: PreTrainedModel, layer: int, direction: Tensor) -> Iterator[None]:
    def change(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + direction, *output[1:])
        return output + direction

    module = list(model.get_submodule(layers_path(model)).children())[layer]
    handle = module.register_forward_hook(change)
    yield
    handle.remove()


def searched(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Every direction and what it does on the rows that it was not made of."""
    harmful, asked = parts(REQUESTS)
    harmless, ordinary = parts(ORDINARY)
    tokens = {int(row[0][first_of(row)]) for row in harmful}
    intact = [next_token(model, row) for row in ordinary]
    found = []
    for back in (-2, -1):
        means = [
            torch.stack([states_of(model, row, back) for row in data]).mean(0)
            for data in (harmful, harmless)
        ]
        for layer, direction in enumerate(means[0] - means[1]):
            own: dict[str, Any] = {"position": back, "layer": layer, "direction": direction}
            with added(model, layer, direction):
                own["induced"] = odds(model, ordinary, tokens)
            with projected(model, direction):
                own["kl"] = divergence(intact, [next_token(model, row) for row in ordinary])
                own["log_odds"] = odds(model, asked, tokens)
            found.append(own)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_refusal_direction_is_the_one_that_meets_all_conditions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAMILIES[name]()
    config.num_hidden_layers = 3
    monkeypatch.setitem(FAMILIES, name, lambda: config)
    model = build(name, dtype=torch.float64)
    before = bits(model)
    # Of three layers the last one's output enters no layer: the paper does not try it.
    every = [own for own in searched(model) if own["layer"] < 2]
    assert len({own["layer"] for own in every}) == 2
    # One of the four is ruled out by each condition, and the best of the others is taken.
    settings: Any = {"positions": 2, "latest": 1.0, "validation": 0.4}
    settings["max_kl"] = sorted(own["kl"] for own in every)[-2] * (1 + 1e-9)
    settings["min_induced"] = min(own["induced"] for own in every) + 1e-9
    passing = [
        own
        for own in every
        if own["kl"] <= settings["max_kl"] and own["induced"] > settings["min_induced"]
    ]
    assert 0 < len(passing) < 4
    best = min(passing, key=lambda own: own["log_odds"])
    found = method("refusal-direction", **settings).find(directed(model))
    for key in ("position", "layer", "kl", "induced", "log_odds"):
        assert found.facts[key] == pytest.approx(best[key], rel=1e-7), key
    assert found.facts["tried"] == 4
    assert isinstance(found, Changed)
    for change in found.changes:
        assert isinstance(change, ProjectOut)
        torch.testing.assert_close(change.direction, best["direction"], rtol=1e-9, atol=1e-12)
    with projected(model, best["direction"]):
        expected = refused(model)
    with found.on(model):
        assert refused(model) == pytest.approx(expected, rel=1e-9)
    assert_same_bits(model, before)
    other = found.control(1).changes[0]
    assert isinstance(other, ProjectOut)
    assert abs(torch.cosine_similarity(other.direction, best["direction"], dim=0)) < 0.6
    # Of what enters the layers 2 and 3 of 3, late ones are left out: at two positions each.
    for latest in (0.7, 0.99, 1.0):
        early = method("refusal-direction", **settings | {"latest": latest, "max_kl": 50.0})
        tried = early.find(directed(model)).facts["tried"]
        assert tried == 2 * sum(layer <= latest * 3 for layer in (2, 3))
    with pytest.raises(ValueError, match=r"at most max_kl, 1e-09, and more than min_induced, 0\.0"):
        method("refusal-direction", max_kl=1e-9, validation=0.4).find(directed(model))


@pytest.mark.parametrize("name", ["llama", "llama_bias", "mixtral"])
def test_ablation_of_the_direction_is_the_orthogonal_model(name: str) -> None:
    model = build(name, dtype=torch.float64)
    settings: Any = {"max_kl": 50.0, "min_induced": -50.0, "validation": 0.4}
    ablated = method("refusal-direction", **settings).find(directed(model))
    edited = method("refusal-orthogonalisation", **settings).find(directed(model))
    with ablated.on(model):  # type: ignore[union-attr]
        expected = [next_token(model, row) for row in SAFETY]
    model.load_state_dict(edited.write())  # type: ignore[union-attr, arg-type]
    found = [next_token(model, row) for row in SAFETY]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "llama_bias", "llama_tied", "mixtral", "gpt_oss"])
def test_an_orthogonal_model_never_writes_the_direction(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    settings: Any = {"max_kl": 50.0, "min_induced": -50.0, "validation": 0.4}
    given = directed(model)
    found = method("refusal-orthogonalisation", **settings).find(given)
    direction, _ = method("refusal-direction", **settings).direction(given)  # type: ignore[attr-defined]
    assert isinstance(found, Edited)
    made = found.write()
    assert isinstance(made, dict)
    assert_same_bits(model, before)
    assert any(not torch.equal(made[key], value) for key, value in found.control(1).write().items())  # type: ignore[union-attr]
    states_before = states_of(model, SAFETY[0], -1) @ direction
    model.load_state_dict(made)
    states = states_of(model, SAFETY[0], -1)
    assert float((states @ direction).abs().max()) < 1e-9 < float(states_before.abs().max())
    # What writes nothing to hidden states is as it was.
    for key, value in model.named_parameters():
        reads = key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "norm.weight"))
        if reads:
            assert torch.equal(value.view(torch.int64), before[key])
    with pytest.raises(ValueError, match="out must be None for a model in memory"):
        found.write("somewhere")


@pytest.mark.parametrize("name", MODELS)
def test_a_single_neuron_is_the_one_that_carries_most(name: str) -> None:
    model = build(name, dtype=torch.float64)
    row = SAFETY[2:]
    given = Inputs(aligned=model, safety=[collate(row)])
    before, intact = bits(model), refused(model, row)
    fallen = {}
    for module, own in find_modules(model).items():
        for unit in range(own.n_units):
            with entering_without(model, module, unit):
                fallen[module, unit] = intact - refused(model, row)
    best = max(fallen, key=lambda each: fallen[each])
    found = method("single-neuron", screened=len(fallen)).find(given)
    assert (found.facts["module"], found.facts["unit"]) == best
    assert found.facts["effect"] == pytest.approx(fallen[best], rel=1e-6)
    assert isinstance(found, Changed)
    with found.on(model):
        assert intact - refused(model, row) == pytest.approx(fallen[best], rel=1e-9)
    assert_same_bits(model, before)
    # A few are screened: the effect may be less, and is that of the unit that is named.
    few = method("single-neuron", screened=3).find(given)
    own = few.facts["module"], few.facts["unit"]
    assert few.facts["effect"] == pytest.approx(fallen[own], rel=1e-6)
    drawn = [found.control(seed).changes[0].selection for seed in range(4)]  # type: ignore[union-attr]
    assert all(len(each) == 1 for each in drawn)  # type: ignore[arg-type]
    assert any(each != drawn[0] for each in drawn)


@contextmanager
def entering_without(model: PreTrainedModel, module: str, unit: int) -> Iterator[None]:
    """One channel of what enters B is 0."""

    def change(_: nn.Module, args: Any) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., unit] = 0
        return (x,)

    handle = model.get_submodule(module).register_forward_pre_hook(change)
    yield
    handle.remove()


def outputs(model: PreTrainedModel, data: list[Row]) -> dict[str, Tensor]:
    """W X of every projection in the layers at responses, without a bias: ``[out, tokens]``."""
    found: dict[str, list[Tensor]] = {}
    inside = layers_path(model)
    for ids, labels in data:
        handles = []
        for name, module in model.named_modules():
            if name.startswith(f"{inside}.") and type(module).__name__ in ("Linear", "Conv1D"):

                def keep(
                    module: nn.Module, args: Any, name: str = name, labels: Tensor = labels
                ) -> None:
                    w = module.weight.detach()
                    w = w.T if type(module).__name__ == "Conv1D" else w
                    found.setdefault(name, []).append(w @ args[0][0, labels != IGNORED].T)

                handles.append(module.register_forward_pre_hook(keep))
        with torch.no_grad():
            model(ids[None])
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_safety_ranks_are_those_of_singular_vectors(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    given = inputs(model)
    found = method("safety-ranks", safety_rank=2, utility_rank=5).find(given)
    assert isinstance(found, Changed)
    expected = {}
    safety, utility = outputs(model, SAFETY), outputs(model, UTILITY)
    for owner, out in safety.items():
        module = model.get_submodule(owner)
        turned = type(module).__name__ == "Conv1D"
        w = module.weight.detach().T if turned else module.weight.detach()
        s = torch.linalg.svd(out).U[:, :2]
        u = torch.linalg.svd(utility[owner]).U[:, :5]
        removed = (torch.eye(len(w)) - u @ u.T) @ s @ s.T @ w
        expected[owner] = (w - removed).T if turned else w - removed
        assert int(torch.linalg.matrix_rank(removed)) == 2
    drawn = found.control(1)
    for which in (found, drawn):
        with which.on(model):
            for owner, weight in expected.items():
                own = model.get_submodule(owner).weight
                same = torch.allclose(own, weight, rtol=0, atol=1e-8)
                assert same == (which is found), owner
                rank = torch.linalg.matrix_rank(own - before[f"{owner}.weight"].view(own.dtype))
                assert int(rank) == 2
        assert_same_bits(model, before)
    assert found.facts == {"matrices": len(expected)}
    # Keys and values are narrower than queries; no row is read before that is known.
    unread = Inputs(model, safety=map(pytest.fail, ["read"]), utility=map(pytest.fail, ["read"]))  # type: ignore[arg-type]
    narrow = 24 if name == "llama" else 48
    for which in ("safety_rank", "utility_rank"):
        ranks = {"safety_rank": 1, "utility_rank": 1, which: narrow + 1}
        with pytest.raises(
            ValueError, match=rf"^{which} is {narrow + 1}; it must be at most {narrow}"
        ):
            method("safety-ranks", **ranks).find(unread)
