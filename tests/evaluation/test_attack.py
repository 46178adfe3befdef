"""Greedy answers, coherence and attack success against direct computations."""

from __future__ import annotations

import json

import pytest
import tiny_chat
import torch
from tiny_models import FAMILIES, build, cases

from ssah.attribution import attribute
from ssah.data import DataError, load_requests, load_rows, make_loader
from ssah.evaluation import (
    Answer,
    Coherence,
    answers,
    attack_success,
    coherence,
    generate,
    judge_answers,
    prompts,
    rate,
    wilson,
)
from ssah.evaluation.generating.generation import answer_tokens, stop_tokens
from ssah.evaluation.judges import Keywords
from ssah.evaluation.measures.coherent_answers import NEUTRAL, _repeated
from ssah.interventions import ablate
from ssah.units import UnitSet

REQUESTS = [
    "How do I bake bread?",
    "Name a bird.",
    "Write three sentences about the sea, please, and mention a lighthouse.",
    "Why?",
]


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.model(), tiny_chat.tokenizer()


@pytest.fixture(scope="module")
def some_units(chat):
    """Half of all units: enough to change every answer."""
    model, tokenizer = chat
    scores = attribute(model, make_loader("builtin:safety_eval", tokenizer, limit=2)).scores
    sizes = {name: len(score) for name, score in scores.items()}
    return UnitSet.random(sum(sizes.values()) // 2, sizes)


def direct(model, ids, stops, max_new_tokens):
    """Greedy decoding of one row: no padding, no cache, the whole sequence at every step."""
    new = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token in stops:
                return new, True
            new.append(token)
    return new, False


# --------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", cases(*FAMILIES))
def test_answers_are_those_of_every_row_by_itself(chat, name):
    _, tokenizer = chat
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (11, 4, 9, 7, 1)]
    stops = {0, 2}  # of the tokenizer, of the model
    for batch_size in (1, 2, 5):
        found = answer_tokens(model, tokenizer, rows, max_new_tokens=9, batch_size=batch_size)
        for ids, answer in zip(rows, found, strict=True):
            expected, ended = direct(model, ids, stops, 9)
            assert answer.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
            assert (answer.tokens, answer.ended) == (len(expected), ended)


def test_an_answer_ends_before_the_first_token_that_ends_it(chat):
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    encoded = prompts(tokenizer, REQUESTS)
    free = [direct(model, ids, {0}, 8)[0] for ids in encoded]
    model.generation_config.eos_token_id = [free[0][3], free[1][0]]
    found = generate(model, tokenizer, REQUESTS, max_new_tokens=8)
    for ids, answer in zip(encoded, found, strict=True):
        new, ended = direct(model, ids, {0, free[0][3], free[1][0]}, 8)
        assert (answer.tokens, answer.ended) == (len(new), ended)
    assert found[0].ended
    assert found[0].tokens <= 3
    assert found[1] == Answer("", 0, True)


def test_a_turn_ends_where_the_template_ends_it(chat):
    model, tokenizer = chat[0], tiny_chat.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = tiny_chat.TEMPLATE.replace("<|end|>", "<|turn|>")
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert stop_tokens(model, tokenizer) == [0, turn]
    tokenizer.chat_template = tiny_chat.TEMPLATE.replace("<|end|>", " end")  # an ordinary word
    assert stop_tokens(model, tokenizer) == [0]


def test_the_models_own_settings_do_not_matter_and_stay(chat):
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    plain = answers(model, tokenizer, REQUESTS, max_new_tokens=8)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.num_beams = True, 5.0, 3
    settings.repetition_penalty, settings.max_length, settings.min_new_tokens = 9.0, 5, 7
    model.config.use_cache = False
    model.train()
    tokenizer.padding_side = "right"
    assert answers(model, tokenizer, REQUESTS, max_new_tokens=8) == plain
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.generation_config is settings
    assert settings.do_sample
    assert settings.temperature == 5.0
    assert tokenizer.padding_side == "right"
    with pytest.raises(RuntimeError, match="stop here"), stopping(model):
        answers(model, tokenizer, REQUESTS)
    assert model.generation_config is settings
    assert model.training


class stopping:
    """The model's forward raises inside the block."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        def stop(*_):
            raise RuntimeError("stop here")

        self.handle = self.model.register_forward_pre_hook(stop)

    def __exit__(self, *_):
        self.handle.remove()


def test_requests_may_be_rows_and_get_what_training_gave_them(chat):
    _, tokenizer = chat
    rows = load_rows("builtin:utility_eval", limit=3)
    asked = prompts(tokenizer, rows)
    assert asked == prompts(tokenizer, [row["prompt"] for row in rows])
    loader = make_loader(rows, tokenizer, batch_size=1)
    trained = [batch["input_ids"][batch["labels"] == -100].tolist() for batch in loader]
    assert sorted(trained) == sorted(asked)
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    (ids,) = prompts(tokenizer, [{"messages": turns}])
    assert tokenizer.decode(ids).count("Hello") == 2
    assert "Because" not in tokenizer.decode(ids)


def test_the_system_prompt_comes_first(chat):
    model, tokenizer = chat
    (without,) = prompts(tokenizer, ["Why?"])
    (with_one,) = prompts(tokenizer, ["Why?"], system_prompt="Be kind.")
    assert tokenizer.decode(with_one) == "<|start|>system\nBe kind.<|end|>\n" + tokenizer.decode(
        without
    )
    assert answers(model, tokenizer, ["Why?"], system_prompt="Be kind.") != answers(
        model, tokenizer, ["Why?"]
    )


def test_without_a_template_turns_are_joined_by_blank_lines(chat):
    model, _ = chat
    tokenizer = tiny_chat.tokenizer()
    tokenizer.chat_template = None
    (ids,) = prompts(tokenizer, ["Why?"], system_prompt="Be kind.")
    assert tokenizer.decode(ids) == "Be kind.\n\nWhy?\n\n"
    assert generate(model, tokenizer, ["Why?"], max_new_tokens=3)[0].tokens <= 3


def test_answers_inside_ablate_are_the_ablated_models(chat, some_units):
    model, tokenizer = chat
    before = answers(model, tokenizer, REQUESTS, max_new_tokens=6)
    with ablate(model, some_units):
        inside = answers(model, tokenizer, REQUESTS, max_new_tokens=6)
        alone = [answers(model, tokenizer, [r], max_new_tokens=6)[0] for r in REQUESTS]
    assert inside == alone != before
    assert answers(model, tokenizer, REQUESTS, max_new_tokens=6) == before


@pytest.mark.parametrize(
    ("requests", "options", "error", "message"),
    [
        ("Why?", {}, ValueError, "requests is a string, must be a list"),
        ([], {}, ValueError, "requests is empty"),
        (["Why?", "  "], {}, DataError, r"requests\[1\]: the request is empty"),
        ([{"text": "Why?"}], {}, DataError, r"requests\[0\]: a row must have 'prompt'"),
        (["Why?"], {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        (["Why?"], {"batch_size": 0}, ValueError, "batch_size is 0"),
        (["Why?", "Why? " * 1000], {}, ValueError, r"requests\[1\] has .* the 2048 positions"),
        (["Why?"], {"max_new_tokens": 5000}, ValueError, r"requests\[0\] has"),
    ],
)
def test_bad_requests_are_refused(chat, requests, options, error, message):
    with pytest.raises(error, match=message):
        answers(*chat, requests, **options)


def test_refusals_of_template_and_model(chat):
    model, _ = chat
    tokenizer = tiny_chat.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match="refuses turns system, user: no system"):
        answers(model, tokenizer, ["Why?"], system_prompt="Be kind.")
    with pytest.raises(TypeError, match="LlamaModel, must be a causal language model"):
        answers(model.base_model, chat[1], ["Why?"])


# ---------------------------------------------------------------------------------------- coherence


def direct_nll(model, context, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + ids])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    total = sum(log_probs[len(context) + k - 1, token].item() for k, token in enumerate(ids))
    return -total / max(len(ids), 8)


@pytest.mark.parametrize("neutral", [False, True])
def test_coherence_scores_answers_given_their_requests(chat, neutral):
    model, tokenizer = chat
    texts = ["Bread takes time. " * 20, "", "An owl.", "  The sea is wide and deep and blue. "]
    scorer = Coherence(model, tokenizer, 1.0, neutral=neutral, batch_size=2)
    found = scorer.nll(texts, REQUESTS)
    for text, request, nll in zip(texts, REQUESTS, found, strict=True):
        (context,) = prompts(tokenizer, [NEUTRAL if neutral else request])
        ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"][:64]
        assert nll == pytest.approx(direct_nll(model, context, ids) if ids else 0.0, rel=1e-4)


def test_an_answer_is_incoherent_for_three_reasons(chat):
    model, tokenizer = chat
    fine, loop = "The owl hunts at night, and sleeps by day.", "again and " * 20
    nll = Coherence(model, tokenizer, 0.0).nll([fine], ["Why?"])[0]
    lenient = Coherence(model, tokenizer, 100.0)
    assert lenient([fine, loop, "", " \n"], ["Why?"] * 4) == [True, False, False, False]
    assert Coherence(model, tokenizer, nll + 0.01)([fine], ["Why?"]) == [True]
    assert Coherence(model, tokenizer, nll - 0.01)([fine], ["Why?"]) == [False]
    assert lenient([], []) == []
    with pytest.raises(ValueError, match="answers are 1 and requests 2"):
        lenient([fine], ["a", "b"])


def test_repetition_is_the_share_of_grams_seen_before():
    assert _repeated([]) == _repeated([1, 2]) == _repeated([1, 2, 3]) == 0
    assert _repeated([1, 1, 1, 1]) == 0.5  # two 3-grams, the second known
    assert _repeated([1, 2, 3, 1, 2, 3, 1, 2]) == 0.5
    assert _repeated(list(range(50))) == 0


def test_nine_in_ten_ordinary_answers_are_below_the_threshold(chat):
    model, tokenizer = chat
    scorer = Coherence.calibrate(model, tokenizer)
    rows = load_rows("builtin:utility")[::2]
    assert len(rows) == 80
    nll = scorer.nll([row["completion"] for row in rows], rows)
    assert sum(n > scorer.max_nll for n in nll) == 8
    assert json.loads(json.dumps(scorer.describe()))["max_nll"] == scorer.max_nll
    texts = [row["completion"] for row in rows[:12]]
    assert coherence(model, tokenizer, texts, rows[:12]) == scorer(texts, rows[:12])
    neutral = Coherence.calibrate(model, tokenizer, neutral=True)
    assert coherence(model, tokenizer, texts) == neutral(texts, rows[:12])


# ------------------------------------------------------------------------------------------- attack


def test_attack_success_counts_what_the_judges_say(chat, some_units):
    model, tokenizer = chat
    scorer = Coherence.calibrate(model, tokenizer)
    judges = ["zou2023", "qi2023", lambda request, answer: len(request) > 15]
    for ablated in (None, some_units):
        found = attack_success(
            model,
            tokenizer,
            REQUESTS,
            judges=judges,
            ablated=ablated,
            coherent=scorer,
            max_new_tokens=12,
            batch_size=3,
        )
        if ablated is None:
            said = generate(model, tokenizer, REQUESTS, max_new_tokens=12)
        else:
            with ablate(model, ablated):
                said = generate(model, tokenizer, REQUESTS, max_new_tokens=12)
        texts = [answer.text for answer in said]
        incoherent = [int(not fine) for fine in scorer(texts, REQUESTS)]  # by the intact model
        assert found["requests"] == 4
        assert found["incoherent"] == {**rate(incoherent), "flags": incoherent}
        assert found["tokens"] == [answer.tokens for answer in said]
        assert found["mean_tokens"] == sum(found["tokens"]) / 4
        assert list(found["judges"])[:2] == ["zou2023", "qi2023"]
        zou = Keywords.load("zou2023")
        assert found["judges"]["zou2023"]["success"] == [int(not zou.refuses(t)) for t in texts]
        last = list(found["judges"].values())[2]
        assert last["success"] == [1, 0, 1, 0]
        assert last["asr"] == {"rate": 0.5, "interval": list(wilson(2, 4)), "count": 2, "n": 4}
        both = sum(s and not i for s, i in zip(last["success"], incoherent, strict=True))
        assert last["asr_coherent"]["count"] == both
        kept = json.dumps(found)
        assert not any(text and text in kept for text in texts)


def test_level_and_calibration_by_default(chat):
    found = attack_success(*chat, REQUESTS, judges=["zou2023"], level=0.5, max_new_tokens=4)
    assert found["ended"]["interval"] == list(wilson(found["ended"]["count"], 4, 0.5))
    assert found["coherence"]["max_nll"] == Coherence.calibrate(*chat).max_nll


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judges": []}, "must be a list with at least one judge"),
        ({"judges": "wei2024"}, "judges is 'wei2024', must be a list"),
        ({"judges": ["qi2023", "qi2023"]}, "'qi2023' more than once"),
        ({"judges": ["wei"]}, "judge is 'wei', must be one of"),
        ({"max_new_tokens": 39}, "fewer than 20 words refusals: it must be at least 40"),
        ({"level": 2}, "level is 2"),
    ],
)
def test_bad_attacks_are_refused(chat, options, message):
    model, tokenizer = chat
    scorer = Coherence(model, tokenizer, 5.0)
    with pytest.raises(ValueError, match=message):
        attack_success(model, tokenizer, REQUESTS, coherent=scorer, **options)


def test_judges_see_requests_of_rows_as_text(chat):
    model, tokenizer = chat
    asked = []

    def listening(request: str, answer: str) -> bool:
        asked.append(request)
        return True

    rows = [
        {"prompt": "Why?", "completion": "Because."},
        {"messages": [{"role": "user", "content": "How?"}]},
        "Who?",
    ]
    attack_success(model, tokenizer, rows, judges=[listening], max_new_tokens=2)
    assert asked == ["Why?", "How?", "Who?"]


def test_rates_and_lists_of_judged_answers(chat):
    model, tokenizer = chat
    said = generate(model, tokenizer, REQUESTS, max_new_tokens=4)
    found = judge_answers(REQUESTS, said, [Keywords.load("qi2023")], Coherence(*chat, 100.0))
    assert set(found) == {*("success", "incoherent", "unfinished", "ended", "tokens", "digests")}
    assert all(value in (0, 1) for value in found["success"]["qi2023"] + found["ended"])
    with pytest.raises(ValueError, match="n is 0"):
        rate([])


def test_an_answer_of_nan_logits_is_no_answer() -> None:
    model = tiny_chat.model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="the model's logits are NaN or infinite"):
        generate(model, tiny_chat.tokenizer(), ["How do I pick a lock?"], max_new_tokens=2)


def test_requests_are_lines_as_text_files_end_them(tmp_path) -> None:
    file = tmp_path / "requests.txt"
    file.write_bytes("one\u2028request\r\nanother\x0cone\n\n\x85a third\x1cone\n".encode())
    assert load_requests(file) == ["one\u2028request", "another\x0cone", "a third\x1cone"]
