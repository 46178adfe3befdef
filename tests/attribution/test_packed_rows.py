"""Rows that hold several documents, and the first token of a document."""

from __future__ import annotations

import pytest
import tiny_chat
import torch

import ssah
from ssah.attribution import METRICS
from ssah.evaluation import utility_loss


@pytest.fixture(scope="module")
def model():
    return tiny_chat.model().double()


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 800, (length,), generator=generator) for length in (5, 9, 17)]


def packed(documents, labels):
    """One row; ``labels``: with those of every token, as a collator may give them."""
    batch = {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(len(each)) for each in documents])[None],
    }
    return {**batch, "labels": batch["input_ids"].clone()} if labels else batch


def singles(documents, labels):
    rows = [{"input_ids": each[None]} for each in documents]
    return [{**row, "labels": row["input_ids"]} if labels else row for row in rows]


def close(found, wanted, relative=1e-12):
    for name, score in wanted.scores.items():
        assert float((found.scores[name] - score).abs().max()) <= relative * float(score.max())
    assert found.count == wanted.count


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_a_packed_row_scores_as_its_documents_do(model, documents, metric, labels):
    wanted = ssah.attribute(model, singles(documents, labels), metric=metric)
    close(ssah.attribute(model, [packed(documents, labels)], metric=metric), wanted)


@pytest.mark.parametrize("metric", ["variance", "taylor"])
def test_documents_that_a_mask_keeps_apart(model, documents, metric):
    batch = packed(documents, labels=False)
    of = torch.repeat_interleave(torch.arange(3), torch.tensor([len(each) for each in documents]))
    batch["attention_mask"] = ((of[:, None] == of) & torch.ones(31, 31).tril().bool())[None, None]
    del batch["position_ids"]  # positions go on, which shifts rotary angles, float32, alike
    wanted = ssah.attribute(model, singles(documents, False), metric=metric)
    close(ssah.attribute(model, [batch], metric=metric), wanted, relative=1e-6)


def test_the_loss_of_a_packed_row(model, documents):
    wanted = utility_loss(model, singles(documents, labels=True))
    assert utility_loss(model, [packed(documents, labels=True)]) == pytest.approx(wanted, rel=1e-12)


def test_the_first_token_of_each_document_can_be_left_out(model, documents):
    inner = [
        {
            "input_ids": each[None],
            "labels": each[None].clone().index_fill_(1, torch.tensor(0), -100),
        }
        for each in documents
    ]
    wanted = ssah.attribute(model, inner, tokens="labels")
    rows = singles(documents, labels=False)
    found = ssah.attribute(model, rows, tokens="after_first")
    close(found, wanted)
    assert (found.tokens, set(found.count.values())) == ("after_first", {28})
    close(ssah.attribute(model, [packed(documents, False)], tokens="after_first"), wanted)
    left = [torch.nn.functional.pad(each, (17 - len(each), 0)) for each in documents]
    mask = torch.stack([(torch.arange(17) >= 17 - len(each)).long() for each in documents])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = {"input_ids": torch.stack(left), "attention_mask": mask, "position_ids": positions}
    close(ssah.attribute(model, [batch], tokens="after_first"), wanted)
