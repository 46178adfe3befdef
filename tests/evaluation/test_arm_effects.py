"""Effects of selections equal softmaxes written out, of one ablated model after the other."""

from __future__ import annotations

import pytest
import torch
from ablatable import some_units
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
    silent = batches()[0]
    silent["labels"][1] = -100
    with pytest.raises(ValueError, match="batch 0 has a row without a response token"):
        effects(model, [silent], [units])
