"""Effects of selections equal softmaxes written out, of one ablated model after the other."""

from __future__ import annotations

import pytest
import torch
from ablatable import assert_same_bits, bits, some_units
from tiny_models import build, collate, rows
from torch import Tensor
from transformers import PreTrainedModel

import ssah
from ssah.evaluation import effects


def batches() -> list[dict[str, Tensor]]:
    return [collate(rows((9, 5)), side="left"), collate(rows((7,), seed=1))]


def by_hand(model: PreTrainedModel) -> list[tuple[Tensor, float]]:
    """Of each row the probabilities of the first token of the response, and its log-probability."""
    found = []
    for length, seed in ((9, 0), (5, 0), (7, 1)):
        lengths = (9, 5) if seed == 0 else (7,)
        ids, labels = rows(lengths, seed=seed)[lengths.index(length)]
        with torch.no_grad():
            p = model(ids[None]).logits[0].softmax(-1)  # [length, vocabulary]
        answer = [t for t in range(length) if labels[t] != -100]
        total = sum(float(p[t - 1, ids[t]].log()) for t in answer)
        found.append((p[answer[0] - 1], total))
    return found


def hidden_by_hand(model: PreTrainedModel, layer: int) -> list[Tensor]:
    """Of each row what one layer puts out at the last token of the prompt and at the first of the
    response, ``[2, hidden]``."""
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    found = []
    for length, seed in ((9, 0), (5, 0), (7, 1)):
        lengths = (9, 5) if seed == 0 else (7,)
        ids, labels = rows(lengths, seed=seed)[lengths.index(length)]
        first = next(t for t in range(length) if labels[t] != -100)
        seen: list[Tensor] = []
        hook = layers[layer].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(ids[None])
        hook.remove()
        found.append(seen[0][0, first - 1 : first + 1].clone())
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_changes_of_hidden_states_equal_ablations_written_out(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    selections = [some_units(model, share, seed=1) for share in (0.0, 0.3)]
    found = effects(
        model, batches(), selections, layers=[1, 0], positions=["last", "first"], arms_at_once=2
    )
    assert found.l2.shape == (2, 3, 2, 2)  # [selections, rows, positions, layers]
    for i, layer in enumerate((1, 0)):
        intact = hidden_by_hand(model, layer)
        with ssah.ablate(model, selections[1]):
            ablated = hidden_by_hand(model, layer)
        for row, (h, moved) in enumerate(zip(intact, ablated, strict=True)):
            for at in range(2):
                l2 = sum(float(x) ** 2 for x in moved[at] - h[at]) ** 0.5
                lengths = float(h[at] @ h[at]) ** 0.5 * float(moved[at] @ moved[at]) ** 0.5
                cosine = float(h[at] @ moved[at]) / lengths
                assert float(found.l2[1, row, at, i]) == pytest.approx(l2, rel=1e-8)
                distance = float(found.cosine_distance[1, row, at, i])
                assert distance == pytest.approx(1 - cosine, rel=1e-6, abs=1e-9)
    assert float(found.l2[0].max()) < 1e-12
    means = {each: found.mean(each) for each in ("kl", "log_prob", "l2", "cosine_distance")}
    assert all(each.shape == (2,) and each[0].abs() < 1e-9 for each in means.values())
    assert float(means["l2"][1]) == pytest.approx(sum(found.l2[1].flatten().tolist()) / 12)
    falls = [a - b for a, b in zip(found.intact, found.log_prob[1], strict=True)]
    assert float(means["log_prob"][1]) == pytest.approx(float(sum(falls)) / 3)
    assert_same_bits(model, before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("arms_at_once", [2, 8])
def test_effects_equal_ablations_written_out(name: str, arms_at_once: int) -> None:
    model = build(name, dtype=torch.float64)
    selections = [some_units(model, share, seed=1) for share in (0.0, 0.1, 0.5)]
    found = effects(model, batches(), selections, arms_at_once=arms_at_once)
    intact = by_hand(model)
    for number, units in enumerate(selections):
        with ssah.ablate(model, units):
            ablated = by_hand(model)
        for row, ((p, _), (q, total)) in enumerate(zip(intact, ablated, strict=True)):
            kl = sum(float(p[v] * (p[v] / q[v]).log()) for v in range(len(p)))
            assert float(found.kl[number, row]) == pytest.approx(kl, rel=1e-8, abs=1e-12)
            assert float(found.log_prob[number, row]) == pytest.approx(total, rel=1e-9)
    assert found.intact.tolist() == pytest.approx([total for _, total in intact], rel=1e-9)
    assert found.kl[0].abs().max() < 1e-12 < 1e-3 < found.kl[2].min()


def test_what_has_no_effect_to_measure_is_refused() -> None:
    model = build("llama")
    units = some_units(model)
    with pytest.raises(ValueError, match="selections is empty"):
        effects(model, batches(), [])
    with pytest.raises(ValueError, match="loader is empty"):
        effects(model, [], [units])
    with pytest.raises(ValueError, match="arms_at_once"):
        effects(model, batches(), [units], arms_at_once=0)
    with pytest.raises(
        ValueError, match=r"layers is \[2\]; must be numbers of layers, from 0 to 1"
    ):
        effects(model, batches(), [units], layers=[2])
    with pytest.raises(ValueError, match="effect is 'l2', which needs layers"):
        effects(model, batches(), [units]).mean("l2")
    with pytest.raises(ValueError, match="effect is 'loss'; it must be one of"):
        effects(model, batches(), [units]).mean("loss")
    silent = batches()[0]
    silent["labels"][1] = -100
    with pytest.raises(ValueError, match="batch 0 has a row without a response token"):
        effects(model, [silent], [units])
