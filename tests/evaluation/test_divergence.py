"""KL to the intact model against float64 loops over rows and positions."""

from __future__ import annotations

import pytest
import tiny_chat
import torch

from ssah.data import load_rows, make_loader
from ssah.evaluation import divergences
from ssah.interventions import ablate
from ssah.selections import select
from ssah.units import UnitSet, find_modules


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.model().double(), tiny_chat.tokenizer()


def drawn(model, seed):
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    return UnitSet.random(sum(sizes.values()) // 3, sizes, seed=seed)


def predictions(model, row):
    """Log-probabilities at the positions that predict the response, ``[n, vocabulary]``."""
    labels = row["labels"][0]
    with torch.no_grad():
        logits = model(input_ids=row["input_ids"], use_cache=False).logits[0]
    at = [i for i in range(len(labels) - 1) if labels[i + 1] != -100]
    return torch.stack([logits[i] - logits[i].logsumexp(0) for i in at])


def test_kl_is_what_a_loop_over_positions_gives(chat):
    model, tokenizer = chat
    rows = load_rows("builtin:utility_eval", limit=5)
    alone = list(make_loader(rows, tokenizer, batch_size=1))  # the longest first, as in batches
    layer, head = select(model, "layers:1"), select(model, "heads:0.1")
    selections = [drawn(model, 0), None, layer, head]
    other = tiny_chat.model(seed=3).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for intact in (None, other):
        loader = make_loader(rows, tokenizer, batch_size=3)
        found = divergences(model, loader, selections, intact=intact)
        for units, own in zip(selections, found, strict=True):
            for i, row in enumerate(alone):
                p = predictions(model if intact is None else intact, row)
                with ablate(model, units if units is not None else selections[0] - selections[0]):
                    q = predictions(model, row)
                kl = [float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True)]
                assert float(own.total[i]) == pytest.approx(sum(kl), abs=1e-9)
                assert float(own.first[i]) == pytest.approx(kl[0], abs=1e-9)
                assert int(own.tokens[i]) == len(kl)
                said = [int(token) for token in row["labels"][0] if token != -100]
                nats = sum(float(b[token]) for b, token in zip(q, said, strict=True))
                assert float(own.log_prob[i]) == pytest.approx(nats, abs=1e-4)
            mean = float(own.total.sum() / own.tokens.sum())
            assert float(own.per_row.mean()) == pytest.approx(mean)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_has_no_divergence_is_refused(chat):
    model, tokenizer = chat
    loader = make_loader("builtin:utility_eval[0:2]", tokenizer)
    other = tiny_chat.model()
    other.resize_token_embeddings(808)
    with pytest.raises(ValueError, match="intact predicts 808 tokens and model 800"):
        divergences(model, loader, [drawn(model, 0)], intact=other)
    batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[-100, -100]])}
    with pytest.raises(ValueError, match="batch 0 has a row without a response token"):
        divergences(model, [batch], [drawn(model, 0)])
    with pytest.raises(ValueError, match="loader is empty"):
        divergences(model, [], [drawn(model, 0)])
