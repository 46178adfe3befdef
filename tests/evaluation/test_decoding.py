"""Answers of several arms in shared batches, against greedy loops of one row and one arm."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny_chat
import torch
from tiny_models import build

from ssah.evaluation import Coherence, identical_tokens, judged_answers
from ssah.evaluation.attacks.attack import counting
from ssah.evaluation.generating import decoding
from ssah.evaluation.generating.generation import answers_of_arms, stop_tokens
from ssah.evaluation.generating.prompting import prompts
from ssah.evaluation.judges import judge
from ssah.evaluation.measures.continuations import continuation_log_probs
from ssah.interventions import ablate, arms
from ssah.selections import select
from ssah.units import UnitSet, find_modules

REQUESTS = ["How do I bake bread?", "Name a bird.", "Why?", "Write three sentences about the sea."]


def alone(model, ids, stops, max_new_tokens):
    """Greedy decoding of one row: no padding, no cache, the whole sequence at every step."""
    new = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
            if new[-1] in stops:
                break
    return new


def half(model, seed):
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    return UnitSet.random(sum(sizes.values()) // 2, sizes, seed=seed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3", "bloom", "qwen3_next"])
def test_every_row_gets_the_tokens_of_its_arm_alone(name):
    model, tokenizer = build(name), tiny_chat.word_tokenizer()
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(3, 128, (n,), generator=generator).tolist()  # noqa: E731
    begin = draw(9)
    rows = [begin + draw(n) for n in (1, 5, 2, 7)]
    selections = [None, half(model, 0), half(model, 1)]
    jobs = [(arm, row) for arm in range(3) for row in range(4)]
    stops = {alone(model, rows[0], {}, 3)[2], alone(model, rows[3], {}, 12)[11]}
    expected = {}
    for arm, units in enumerate(selections):
        with ablate(model, units if units is not None else half(model, 0) - half(model, 0)):
            expected |= {(arm, row): alone(model, rows[row], stops, 19) for row in range(4)}
    own = [expected[job] for job in jobs]
    assert len({tuple(each) for each in own}) > 4  # the arms differ
    assert len({len(each) for each in own}) > 1  # and some rows end early
    with decoding.greedy(model, tokenizer, sorted(stops), 19), arms(model, selections) as run:
        prompts, arm = [rows[row] for _, row in jobs], [arm for arm, _ in jobs]
        found = decoding.decode(model, prompts, sorted(stops), 19, run, arm)
    assert found == own


def test_what_is_alike_is_run_once_and_ended_rows_leave():
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    passes = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rows = [[*range(20, 32), 40], [*range(20, 32), 41, 42, 43]]
    stop = alone(model, rows[0], {}, 3)[2]
    assert stop not in alone(model, rows[1], {}, 20)
    passes.clear()
    with decoding.greedy(model, tokenizer, [stop], 20):
        decoding.decode(model, rows, [stop], 20)
    # The beginning of 12 tokens, the rest of both, and steps: of both to the end of a stretch of 8,
    # then of the one that goes on.
    assert passes == [(1, 12), (2, 3), *[(2, 1)] * 7, *[(1, 1)] * 12]


def test_judged_answers_of_arms_are_those_of_each_arm():
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    selections, judges = [None, half(model, 0), half(model, 1)], [judge("qi2023")]
    coherent = Coherence(model, tokenizer, 6.0)
    options = {"max_new_tokens": 12, "batch_size": 2}
    keep = counting(lambda _: None)

    def judged(*own):
        return judged_answers(
            model, tokenizer, REQUESTS, judges, coherent, keep, selections=own, **options
        )

    together = judged(*selections)
    assert together == [judged(units)[0] for units in selections]
    assert together[0]["digests"] != together[1]["digests"]


def test_heads_answer_beside_units_and_layers_by_themselves():
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = [select(model, text) for text in ("heads:0.1,1.0", "layers:1", "parameters:*norm*")]
    selections = [half(model, 0), texts[0], None, *texts[1:]]
    encoded = prompts(tokenizer, REQUESTS)
    jobs = [(arm, row) for row in range(len(encoded)) for arm in range(len(selections))]
    options = {"max_new_tokens": 10, "at_once": 3}
    found = answers_of_arms(model, tokenizer, encoded, jobs, selections, **options)
    for arm, what in enumerate(selections):
        own = [(0, row) for row in range(len(encoded))]
        with ablate(model, what) if what is not None else nullcontext():
            wanted = answers_of_arms(model, tokenizer, encoded, own, [None], **options)
        assert [found[jobs.index((arm, row))] for _, row in own] == wanted
    with pytest.raises(ValueError, match=r"selections\[1\] has entries beside units and heads"):
        arms(model, [None, texts[1]])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_answers_are_made_ahead_as_far_as_memory_goes(monkeypatch):
    from ssah.evaluation.attacks import answering

    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    made, done = [], {(0, 0)}

    def counted(*args, **options):
        made.append(len(args[3]))
        return answers_of_arms(*args, **options)

    monkeypatch.setattr(answering, "answers_of_arms", counted)
    monkeypatch.setattr(answering, "fitting_rows", lambda *_: 3)
    kept = {}

    def keep(arm, number, compute):
        kept[arm, number] = kept[0, 0] if (arm, number) in done and kept else compute()
        return kept[arm, number]

    def judged(known):
        return judged_answers(
            model, tokenizer, REQUESTS, [judge("qi2023")], Coherence(model, tokenizer, 6.0), keep,
            selections=[None, half(model, 0)], kept=lambda *job: job in known,
            max_new_tokens=4, batch_size=1,
        )  # fmt: skip

    judged(set())
    assert made == [3, 3, 2]  # two arms of four batches of one request
    made.clear()
    judged(done)
    assert made == [3, 3, 1]


def test_as_many_rows_as_half_of_the_free_memory_holds(tmp_path, monkeypatch):
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    free = tmp_path / "meminfo"
    monkeypatch.setattr(decoding, "_MEMINFO", free)

    def rows(kibibytes):
        free.write_text(f"MemTotal:  99 kB\nMemAvailable:  {kibibytes} kB\n")
        with decoding.greedy(model, tokenizer, stop_tokens(model, tokenizer), 10):
            return decoding.rows_at_once(model, [[5] * 7, [5] * 30], 10, 4)

    # A position: keys and values of two layers with 2 heads of 8 numbers of 4 bytes.
    row = 2 * (2 * 2 * 2 * 8 * 4) * (30 + 10) + 12 * 800
    assert rows(-(-20 * row // 512)) == 20
    assert rows(1) == 4
    assert rows(10**9) == 128
    free.unlink()
    with decoding.greedy(model, tokenizer, [0], 10):
        assert decoding.rows_at_once(model, [[5] * 7], 10, 4) == 4


def test_coherence_asks_the_model_once_for_each_answer(monkeypatch):
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    scorer = Coherence(model, tokenizer, 7.0)
    fine = ["The owl hunts at night.", "The sea is wide and deep.", "The owl hunts at night."]
    texts, asked = [*fine, "", "again and " * 20, fine[0]], ["a", "b", "a", "a", "a", "b"]
    nll = scorer.nll(texts, asked)
    expected = [n <= 7.0 and i not in (3, 4) for i, n in enumerate(nll)]
    seen, own = [], Coherence.nll
    monkeypatch.setattr(
        Coherence, "nll", lambda self, *given: seen.append(given) or own(self, *given)
    )
    assert scorer(texts, asked) == expected
    assert seen == [([fine[0], fine[1], fine[0]], ["a", "b", "b"], [None] * 3)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3", "qwen3_next"])
def test_continuations_have_the_log_probabilities_of_whole_rows(name):
    model, tokenizer = build(name).double(), tiny_chat.word_tokenizer()
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(3, 128, (n,), generator=generator).tolist()  # noqa: E731
    begin = draw(9)
    asked = [begin + draw(n) for n in (1, 5, 2)]
    pairs = [(asked[i], draw(n)) for i, n in ((0, 4), (1, 1), (0, 7), (2, 3), (2, 6), (1, 2))]
    passes = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: passes.append(args[0].numel())
    )
    for batch_size in (1, 3, 6):
        passes.clear()
        found = continuation_log_probs(model, tokenizer, *zip(*pairs, strict=True), batch_size)
        tokens = sum(passes)
        for (prompt, ids), log_prob in zip(pairs, found.tolist(), strict=True):
            with torch.no_grad():
                rows = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            exact = sum(float(rows[len(prompt) - 1 + k, token]) for k, token in enumerate(ids))
            assert log_prob == pytest.approx(exact, abs=1e-5)
    if name in ("llama", "gpt2", "bloom"):
        # What the prompts begin with (each keeps a token), the rest of all three but for their last
        # tokens, and six continuations.
        assert tokens == 8 + 3 * (9 + 5 - 1 - 8) + 6 * 7


def test_what_the_intact_model_said_is_scored_as_it_says_it(monkeypatch):
    model, tokenizer = tiny_chat.model().double(), tiny_chat.tokenizer()
    encoded = prompts(tokenizer, REQUESTS)
    stop = alone(model, encoded[1], {}, 5)[4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", stop)  # so that some rows end
    jobs = [(arm, row) for row in range(4) for arm in range(2)]
    selections = [None, half(model, 0)]
    options = {"max_new_tokens": 11, "at_once": 3, "scored": True}
    found = answers_of_arms(model, tokenizer, encoded, jobs, selections, **options)
    assert len({each.tokens for each in found}) > 1
    for (arm, row), answer in zip(jobs, found, strict=True):
        ids, log_probs = answer.said
        assert len(ids) == answer.tokens
        assert len(log_probs) == (0 if arm else answer.tokens)
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([encoded[row] + ids])).logits[0].log_softmax(-1)
        exact = [float(rows[len(encoded[row]) - 1 + k, token]) for k, token in enumerate(ids)]
        assert log_probs == pytest.approx([] if arm else exact, abs=1e-5)
    plain = answers_of_arms(
        model, tokenizer, encoded, jobs, selections, **options | {"scored": False}
    )
    assert plain == found
    assert all(each.said[1] == [] for each in plain)


def test_coherence_runs_what_the_intact_model_said_itself_no_second_time():
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    scorer = Coherence(model, tokenizer, 9.0)
    text, request = "The owl hunts at night.", "Name a bird."
    (context,) = prompts(tokenizer, [request])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    given = [-0.25 * k for k in range(len(ids))]  # not those of the model, to be told from them
    n = len(ids)
    mean = sum(0.25 * k for k in range(n)) / n
    own, other = scorer.nll([text], [request])[0], "The sea is wide."
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert scorer.nll([text], [request], [(context, ids, given)]) == [pytest.approx(mean)]
    assert passes == []
    # After another prompt, or as other tokens, it is another answer.
    for said in [([*context, 5], ids, given), (context, [*ids, 5], [*given, 0.0]), None]:
        assert scorer.nll([text], [request], [said]) == [pytest.approx(own)]
    assert len(passes) == 3
    both = scorer.nll([other, text], [request] * 2, [None, (context, ids, given)])
    assert both == [pytest.approx(scorer.nll([other], [request])[0]), pytest.approx(mean)]
    # Of two arms that give one answer, the one that was scored as it was said is taken.
    passes.clear()
    assert scorer([text] * 2, [request] * 2, [None, (context, ids, given)]) == [mean <= 9.0] * 2
    assert passes == []
    hook.remove()


def test_how_many_tokens_of_a_batch_are_those_of_each_model_alone(monkeypatch):
    from dataclasses import replace

    from ssah.evaluation.attacks import batching

    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    selections, requests = [None, half(model, 0), select(model, "layers:1")], REQUESTS[:2]
    stops, total = stop_tokens(model, tokenizer), 0
    for what in selections:
        with ablate(model, what) if what is not None else nullcontext():
            said = [alone(model, ids, stops, 6) for ids in prompts(tokenizer, requests)]
        total += sum(len(ids) - (ids[-1] in stops) for ids in said)
    found = identical_tokens(model, tokenizer, requests, selections, max_new_tokens=6)
    assert found == {"share": 1.0, "tokens": total, "requests": 2}

    def other(*args, **options):
        answers = answers_of_arms(*args, **options)
        ids = answers[3].said[0]  # one answer goes another way after two tokens
        answers[3] = replace(answers[3], said=([*ids[:2], *(token + 1 for token in ids[2:])], []))
        assert len(ids) > 2
        lost.append(len(ids) - 2)
        return answers

    lost = []
    monkeypatch.setattr(batching, "answers_of_arms", other)
    found = identical_tokens(model, tokenizer, requests, selections, max_new_tokens=6)
    assert found["share"] == pytest.approx((total - lost[0]) / total)
