"""SCANS against one request at a time, in float64, with hooks written out here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny_chat
import torch
from ablatable import assert_same_bits, bits
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ssah.data import load_requests, load_rows, make_loader
from ssah.evaluation import answers, prompts, utility_loss
from ssah.methods import Changed, Inputs, method
from ssah.methods.batch_rows import part_of_each, split_batches, split_texts
from ssah.methods.scans import best_threshold

TOKENIZER = tiny_chat.tokenizer()
SAFETY, UTILITY = (list(load_rows(f"builtin:{name}"))[:16] for name in ("safety", "utility"))
BORDERLINE = load_requests("builtin:overrefusal")[:8]


def model(name: str) -> PreTrainedModel:
    if name == "llama":
        return tiny_chat.model().double()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=800, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).double().eval()


def inputs(model: PreTrainedModel) -> Inputs:
    return Inputs(
        aligned=model,
        safety=make_loader(SAFETY, TOKENIZER, batch_size=5),
        utility=make_loader(UTILITY, TOKENIZER, batch_size=3),
        tokenizer=TOKENIZER,
        borderline=BORDERLINE,
    )


def layers(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.model.layers if hasattr(model, "model") else model.transformer.h)


def states(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """``[layers, hidden]`` at the last token, before the final norm."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0, -1].detach())

    handles = [layer.register_forward_hook(keep) for layer in layers(model)]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def parted(loader: Any) -> list[list[tuple[list[int], int]]]:
    """Prompts and first tokens of responses, in the parts that the method draws."""
    rows = []
    for batch in loader:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            start = int((labels != -100).nonzero()[0])
            rows.append((ids[:start].tolist(), int(ids[start])))
    part = part_of_each(len(rows), (0.5, 0.25, 0.25), 0).tolist()
    return [[row for row, own in zip(rows, part, strict=True) if own == n] for n in range(3)]


class Oracle:
    def __init__(self, model: PreTrainedModel, n_steered: int) -> None:
        self.model = model
        given = inputs(model)
        self.anchors, *harmful = parted(given.safety)
        ordinary = [row for part in parted(given.utility) for row in part]
        means = [
            sum(states(model, ids) for ids, _ in rows) / len(rows)
            for rows in (self.anchors, ordinary)
        ]
        self.v = torch.stack([d / d.norm() for d in means[0] - means[1]])
        scores = []
        for direction in self.v:
            logits = self.head(direction)
            said = [float(logits[token]) for _, token in self.anchors]
            other = [float(logits[token]) for _, token in ordinary]
            spread = float(((logits - logits.mean()) ** 2).sum() / (len(logits) - 1)) ** 0.5
            scores.append((sum(said) / len(said) - sum(other) / len(other)) / spread)
        sums = [sum(scores[i : i + n_steered]) for i in range(len(scores) - n_steered + 1)]
        self.first = sums.index(max(sums))
        self.steered = range(self.first, self.first + n_steered)
        self.reference = sum(self.shift(ids) for ids, _ in self.anchors) / len(self.anchors)
        drawn = part_of_each(len(BORDERLINE), (0.5, 0.5), 0).tolist()
        self.looks = []
        for number, rows in enumerate(harmful):
            texts = [t for t, own in zip(BORDERLINE, drawn, strict=True) if own == number]
            own = [self.look(ids) for ids, _ in rows]
            self.looks.append((own, [self.look(ids) for ids in prompts(TOKENIZER, texts)]))

    def head(self, h: Tensor) -> Tensor:
        body: Any = getattr(self.model, "model", None) or self.model.transformer
        norm = body.norm if hasattr(body, "norm") else body.ln_f
        return self.model.lm_head(norm(h)).detach()

    def shift(self, ids: list[int]) -> Tensor:
        opening = TOKENIZER("Sure", add_special_tokens=False)["input_ids"]
        return states(self.model, ids) - states(self.model, ids + opening)

    def look(self, ids: list[int]) -> float:
        total = 0.0
        for own, other in list(zip(self.shift(ids), self.reference, strict=True))[self.first :]:
            total += float(own @ other / own.norm() / other.norm())
        return total / (len(self.v) - self.first)

    def right(self, number: int, threshold: float) -> tuple[float, float]:
        harmful, harmless = self.looks[number]
        return (
            sum(look >= threshold for look in harmful) / len(harmful),
            sum(look < threshold for look in harmless) / len(harmless),
        )

    def threshold(self) -> float:
        values = sorted(look for each in self.looks[0] for look in each)
        between = [(a + b) / 2 for a, b in pairwise(values)]
        return max(between, key=lambda t: sum(self.right(0, t)))

    def logits(self, ids: list[int], end: int, threshold: float, alpha: float) -> Tensor:
        """Of text with a prompt that ends at ``end``, steered as its own look says."""
        sign = 1 if self.look(ids[: end + 1]) >= threshold else -1
        handles = []
        for number in self.steered:

            def steer(_: nn.Module, __: Any, output: Any, v: Tensor = self.v[number]) -> Any:
                h = (output[0] if isinstance(output, tuple) else output).clone()
                h[:, end:] += sign * alpha * v
                return (h, *output[1:]) if isinstance(output, tuple) else h

            handles.append(layers(self.model)[number].register_forward_hook(steer))
        with torch.no_grad():
            found = self.model(torch.tensor([ids])).logits[0]
        for handle in handles:
            handle.remove()
        return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_request_is_steered_as_it_looks(name: str) -> None:
    own = model(name)
    before = bits(own)
    settings: Any = {"alpha": 6.0, "share": 0.5}
    oracle = Oracle(own, {"llama": 1, "gpt2": 2}[name])
    threshold = oracle.threshold()
    given = inputs(own)
    found = method("scans", **settings).find(given)
    assert_same_bits(own, before)
    assert isinstance(found, Changed)
    assert found.facts["layers"] == list(oracle.steered)
    assert found.facts["threshold"] == pytest.approx(threshold, abs=1e-8)
    for number, part in enumerate(("calibration", "held_out")):
        told = found.facts[part]
        assert (told["harmful_right"], told["harmless_right"]) == oracle.right(number, threshold)
        assert (told["harmful"], told["harmless"]) == (4, 4)
    # A loss is of prompts and responses at once, and padded.
    total, tokens = 0.0, 0
    for batch in given.utility:  # type: ignore[union-attr]
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        ):
            text = ids[mask.bool()].tolist()
            start = int((labels != -100).nonzero()[0])
            log_p = oracle.logits(text, start - 1, threshold, 6.0).log_softmax(-1)
            total -= sum(float(log_p[t - 1, text[t]]) for t in range(start, len(text)))
            tokens += len(text) - start
    with found.on(own):
        assert utility_loss(own, given.utility) == pytest.approx(total / tokens, rel=1e-5)  # type: ignore[arg-type]
    # Answers to requests of both signs, without padding and a cache.
    asked = [*BORDERLINE[:2], SAFETY[0]["prompt"], SAFETY[1]["prompt"]]
    expected = []
    for ids in prompts(TOKENIZER, asked):
        text = list(ids)
        for _ in range(3):
            text.append(int(oracle.logits(text, len(ids) - 1, threshold, 6.0)[-1].argmax()))
        expected.append(TOKENIZER.decode(text[len(ids) :], skip_special_tokens=True).strip())
    with found.on(own):
        assert answers(own, TOKENIZER, asked, max_new_tokens=3) == expected
    assert_same_bits(own, before)
    # Another model is steered as a request looks to that one.
    encoded = prompts(TOKENIZER, [*BORDERLINE[:4], *(row["prompt"] for row in SAFETY[:4])])
    signs = [oracle.look(ids) >= threshold for ids in encoded]
    oracle.model = other = model(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert [oracle.look(ids) >= threshold for ids in encoded] != signs
    for ids in encoded:
        with found.on(other), torch.no_grad():
            steered = other(torch.tensor([ids])).logits[0]
        expected_logits = oracle.logits(ids, len(ids) - 1, threshold, 6.0)
        torch.testing.assert_close(steered, expected_logits, rtol=1e-5, atol=1e-6)
    # The control has the same signs, lengths and angles.
    (change,), (drawn,) = found.changes, found.control(1).changes
    assert change.rows is drawn.rows  # type: ignore[union-attr]
    vectors, others = change.vector, drawn.vector  # type: ignore[union-attr]
    torch.testing.assert_close(vectors / 6, oracle.v[oracle.first :][: len(vectors)])
    torch.testing.assert_close(others @ others.T, vectors @ vectors.T)
    assert float(torch.cosine_similarity(vectors, others).abs().max()) < 0.7
    assert not torch.equal(others, found.control(2).changes[0].vector)  # type: ignore[union-attr]


def test_text_without_a_prompt_is_left_alone() -> None:
    own = model("llama")
    found = method("scans").find(inputs(own))
    plain = {"input_ids": torch.tensor([[5, 9, 30, 7, 44, 8, 60]])}
    with torch.no_grad():
        expected = own(**plain).logits
        with found.on(own):  # type: ignore[union-attr]
            assert torch.equal(own(**plain).logits, expected)


def test_the_threshold_tells_most_apart() -> None:
    harmful, harmless = torch.tensor([0.9, 0.6, 0.8]), torch.tensor([0.1, 0.7, 0.2, 0.3])
    # Between 0.3 and 0.6 all harmful ones are right and three of four others.
    assert best_threshold(harmful, harmless) == pytest.approx(0.45)
    with pytest.raises(ValueError, match="look alike on the calibration split"):
        best_threshold(torch.ones(2), torch.ones(3))


def test_parts_share_no_row_and_are_drawn() -> None:
    loader = make_loader(SAFETY[:10], TOKENIZER, batch_size=4)
    parts = split_batches(loader, (0.5, 0.25, 0.25), "safety")
    rows = [
        [tuple(ids[mask.bool()].tolist()) for b in part for ids, mask in _pairs(b)]
        for part in parts
    ]
    assert [len(each) for each in rows] == [5, 3, 2]
    every = [tuple(ids[mask.bool()].tolist()) for batch in loader for ids, mask in _pairs(batch)]
    assert sorted(row for part in rows for row in part) == sorted(every)
    assert rows[0] != every[:5]  # the longest come first in a loader
    texts = split_texts("abcdefgh", (0.5, 0.5), "texts")
    assert sorted(texts[0] + texts[1]) == list("abcdefgh")
    assert texts[0] != list("abcd")
    with pytest.raises(ValueError, match=r"safety has 2 rows, of which the parts .* it must"):
        split_batches(make_loader(SAFETY[:2], TOKENIZER), (0.5, 0.25, 0.25), "safety")
    with pytest.raises(ValueError, match="borderline has 1 rows"):
        split_texts(["a"], (0.5, 0.5), "borderline")


def _pairs(batch: Any) -> Any:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)
