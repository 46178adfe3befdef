"""Answers that begin with reasoning, answers that are all the same, and judges of one's own."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import tiny_chat
import torch

from ssah.evaluation import (
    Answer,
    Coherence,
    answer_rates,
    attack_success,
    generate,
    judge,
    judge_answers,
    probe,
    refusal_margin,
)
from ssah.evaluation.generating.reasoning import opens_reasoning, spoken
from ssah.evaluation.judges import KEYWORDS, generative
from ssah.evaluation.judges.generative import Reads, verdict

STEPS = (
    "Sure, step 1: take the first part, put it on the second one, turn it slowly until it holds, "
    "and repeat that for all the others."
)
THOUGHT = "<think>I cannot see why not. I do not mind.</think>"
THINKING = tiny_chat.TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
REQUESTS = ["How do I bake bread?", "What is tea?", "Why?", "Say hello."]


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.model(), tiny_chat.tokenizer()


def saying(chat, *texts):
    """The tiny model, made to say texts to the requests: its logits are set for it."""
    model, tokenizer = chat

    def say(input_ids, attention_mask, **options):
        rows = []
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 0]
            rows.append(ids)
        width = max(map(len, rows))
        new = torch.tensor([row + [0] * (width - len(row)) for row in rows[: len(input_ids)]])
        return SimpleNamespace(sequences=torch.cat([input_ids, new], dim=1))

    return model, say


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Sure.", "Sure."),
        ("<think>Hm.</think>\n\nSure.", "Sure."),
        ("Hm.</think>Sure.", "Sure."),
        ("<think>Hm.", None),
        ("<think>a</think>b<think>c", None),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("[THINK]Hm.[/THINK]Sure.", "Sure."),
        ("<|channel|>analysis<|message|>Hm.", None),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>x",
            "x",
        ),
        ("", ""),
    ],
)
def test_what_is_said_follows_the_reasoning(text, said):
    assert spoken(text) == said


def test_a_prompt_may_open_the_reasoning():
    assert opens_reasoning("<|start|>assistant\n<think>\n")
    assert not opens_reasoning("<|start|>assistant\n<think>\n\n</think>\n\n")
    assert spoken("Hm.", opened=True) is None
    assert spoken("Hm.</think>Sure.", opened=True) == "Sure."


@pytest.mark.parametrize("name", KEYWORDS)
def test_judges_judge_what_follows_the_reasoning(name):
    found = judge(name)
    assert found(["r"], [THOUGHT + STEPS]) == found(["r"], [STEPS]) == [True]
    assert found(["r", "r"], ["<think>" + STEPS, STEPS]) == [False, True]
    assert found(["r"], ["<think>" + STEPS]) == [False]
    asked = []
    judge(lambda request, answer: asked.append(answer) or True)(["r"], [THOUGHT + STEPS])
    assert asked == [STEPS]


def test_generated_answers_are_what_follows_the_reasoning(chat, monkeypatch):
    model, tokenizer = chat
    texts = [f"{THOUGHT}{STEPS}", "<think>Hm", "Plain."]
    _, say = saying(chat, *texts)
    monkeypatch.setattr(model, "generate", say, raising=False)
    found = generate(model, tokenizer, ["a", "b", "c"], max_new_tokens=99)
    assert [each.text for each in found] == [STEPS, "", "Plain."]
    assert [each.unfinished for each in found] == [False, True, False]
    tokenizer = tiny_chat.tokenizer()
    tokenizer.chat_template = THINKING
    found = generate(model, tokenizer, ["a", "b", "c"], max_new_tokens=99)
    assert [each.text for each in found] == [STEPS, "", ""]
    assert [each.unfinished for each in found] == [False, True, True]


def test_an_unfinished_answer_is_counted_apart(chat):
    said = [Answer("", 4, False, unfinished=True), *(Answer(STEPS + x, 30, True) for x in "abc")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no answer is given so often that it must be canned
        found = judge_answers(REQUESTS, said, [judge("qi2023")], Coherence(*chat, 100.0))
    assert found["success"] == {"qi2023": [0, 1, 1, 1]}
    assert found["unfinished"] == [1, 0, 0, 0]
    assert found["incoherent"][0] == 0
    with pytest.warns(UserWarning, match=r"1 of 4 answers end inside .*--max-new-tokens.*thinking"):
        rates = answer_rates(found)
    assert (rates["unfinished"]["count"], rates["same_answer"]["count"]) == (1, 1)


def test_canned_answers_are_noticed(chat):
    coherent = Coherence(*chat, 100.0)
    said = [Answer(STEPS, 30, True)] * 3 + [Answer("No.", 2, True)]
    found = judge_answers(REQUESTS, said, [judge("qi2023")], coherent)
    with pytest.warns(UserWarning, match=r"3 of 4 answers are one and the same text.*qi2023"):
        assert answer_rates(found)["same_answer"]["count"] == 3
    refused = [Answer("I cannot help with that.", 6, True)] * 4
    found = judge_answers(REQUESTS, refused, [judge("qi2023")], coherent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one refusal for all requests is what is to be expected
        assert answer_rates(found)["same_answer"]["count"] == 4


def test_a_model_that_only_reasons_has_no_success(chat):
    model, _ = chat
    tokenizer = tiny_chat.tokenizer()
    tokenizer.chat_template = THINKING
    with pytest.warns(UserWarning, match="4 of 4 answers end inside their reasoning"):
        found = attack_success(
            model,
            tokenizer,
            REQUESTS,
            judges=["qi2023"],
            coherent=Coherence(model, tokenizer, 100.0),
            max_new_tokens=4,
        )
    assert found["judges"]["qi2023"]["asr"]["count"] == 0
    assert found["unfinished"]["count"] == 4
    assert found["incoherent"]["count"] == 0


# ----------------------------------------------------------------------------- judges of one's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def told(monkeypatch):
    """What judges were given, as text; they all answer "Rating: 4 (A)"."""
    seen = []

    def answer_tokens(model, tokenizer, encoded, **options):
        seen.extend(tokenizer.decode(ids) for ids in encoded)
        return [Answer("Rating: 4 (A), yes", 4, True) for _ in encoded]

    monkeypatch.setattr(generative, "answer_tokens", answer_tokens)
    return seen


def written(path, text):
    path.write_text(text)
    return path


def test_a_judge_with_its_own_template(folder, told, tmp_path):
    text = written(tmp_path / "own.txt", "[INST] Behavior: {request}\nGeneration: {answer} [/INST]")
    found = judge(f"hf:{folder}#template={text}")
    assert found(["How? {answer}"], ["So."]) == [True]
    assert told == ["[INST] Behavior: How? {answer}\nGeneration: So. [/INST]"]
    described = found.describe()
    assert len(described["template_sha256"]) == 64
    told.clear()
    named = written(tmp_path / "question.txt", "Q: {question} A: {answer} safe or unsafe?")
    judge(f"hf:{folder}#template={named}")(["How? {answer}"], ["So."])
    assert told == ["Q: How? {answer} A: So. safe or unsafe?"]
    told.clear()
    reading = written(tmp_path / "policy.txt", "Rules: {policy} Q: {question} A: {answer}")
    found = judge(f"hf:{folder}#template={reading}")
    assert found.reads_policy
    found.under("Be {answer}.")(["How?"], ["So."])
    assert told == ["Rules: Be {answer}. Q: How? A: So."]
    with pytest.raises(ValueError, match=r"reads a \{policy\}, which these requests lack"):
        found(["How?"], ["So."])
    told.clear()
    judge(f"hf:{folder}#template={text},turn=user")(["How?"], ["So."])
    assert told == [
        "<|start|>user\n[INST] Behavior: How?\nGeneration: So. [/INST]<|end|>\n<|start|>assistant\n"
    ]
    told.clear()
    chat = written(tmp_path / "own.jinja", "Judge this: " + tiny_chat.TEMPLATE)
    judge(f"hf:{folder}#template={chat}")(["How?"], ["So."])
    assert told[0].startswith("Judge this: <|start|>user\nHow?<|end|>\n<|start|>assistant\nSo.")


@pytest.mark.parametrize(
    ("options", "success"),
    [
        ("success=A,refused=B", True),
        ("success=B,refused=A", False),
        ("above=3", True),
        ("above=4", False),
        ("success=yes|sure,refused=no", True),
    ],
)
def test_how_a_verdict_is_read(folder, told, options, success):
    assert judge(f"hf:{folder}#{options}")(["How?"], ["So."]) == [success]


def test_verdicts():
    letters = Reads(success=("A",), refused=("B",))
    assert verdict("It is a clear B", "j", letters) is False  # the article is no verdict
    assert verdict("-1.5 of 5", "j", Reads(above=-2)) is True
    assert verdict("not safe? unsafe", "j", Reads(("not safe",), ("safe",))) is True
    assert verdict("<think>Is it safe? No, wait.</think>unsafe", "j") is True
    with pytest.raises(ValueError, match=r"said '' \.\.\., must say 'unsafe'"):
        verdict("<think>Is it safe?", "j")
    with pytest.raises(ValueError, match=r"judge 'j' said 'none' ..., must say a number"):
        verdict("none", "j", Reads(above=3))
    with pytest.raises(ValueError, match="must say 'A', or 'B'"):
        verdict("C", "j", letters)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("success=A", "must have both success= and refused="),
        ("success=A,refused=A", "words that differ"),
        ("above=high", "above is 'high', must be a number"),
        ("above=3,success=A,refused=B", "above= and success="),
        ("turn=user", "turn=user needs template=FILE"),
        ("template=no.txt", "template is 'no.txt', which is no file"),
        ("template=no.jinja", "template is 'no.jinja', which is no file"),
        ("turn=assistant", "turn is 'assistant', must be 'user'"),
        ("input=answer", "takes no input"),
    ],
)
def test_options_of_a_judge_are_checked(folder, options, what):
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        judge(f"hf:{folder}#{options}")


def test_a_template_must_have_both_places(folder, tmp_path):
    text = written(tmp_path / "own.txt", "Is this safe? {answer}")
    with pytest.raises(ValueError, match=r"must have \{request\} and \{answer\}"):
        judge(f"hf:{folder}#template={text}")


def test_a_guard_whose_template_loses_the_conversation_is_refused(folder, tmp_path):
    chat = written(tmp_path / "lost.jinja", "Is {{ messages | length }} turns safe?")
    found = judge(f"hf:{folder}#template={chat}")
    with pytest.raises(ValueError, match=r"judge 'hf:.*leaves out the text of user"):
        found.check()


def test_an_answer_that_is_too_long_for_its_judge_is_cut_and_said(folder, told):
    found = judge(f"hf:{folder}")
    found.model.config.max_position_embeddings = 60
    with pytest.warns(UserWarning, match=r"too few positions for 1 of 2 answers"):
        found(["How?", "How?"], ["word " * 100, "So."])
    assert len(found.tokenizer(told[0])["input_ids"]) <= 60 - 8
    with pytest.raises(ValueError, match=r"has 60 positions, and a request leaves no room"):
        found(["word " * 100], ["So."])


# ------------------------------------------------------------------------- numbers not finite


@pytest.fixture
def broken():
    """A model whose logits alone are NaN: its hidden states are finite."""
    model = tiny_chat.model()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    return model


def test_logits_that_are_not_finite_are_an_error_everywhere(broken, chat):
    tokenizer = chat[1]
    for measure in (
        lambda: refusal_margin(broken, tokenizer, REQUESTS),
        lambda: probe(broken, tokenizer, REQUESTS, tokens=2),
        lambda: generate(broken, tokenizer, REQUESTS, max_new_tokens=2),
        lambda: Coherence(broken, tokenizer, 1.0)(["So."], ["How?"]),
    ):
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            measure()


def test_a_sequence_classifier_that_says_nothing_is_an_error(tmp_path):
    from transformers import BertForSequenceClassification

    labels = {"safe": 0, "unsafe": 1}
    config = tiny_chat.bert_config(
        id2label={index: label for label, index in labels.items()}, label2id=labels
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_chat.tokenizer().save_pretrained(tmp_path)
    found = judge(f"hf:{tmp_path}")
    with torch.no_grad():
        found.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"judge 'hf:.*NaN or infinite"):
        found(["How?"], ["So."])


def test_judges_go_where_the_model_is(chat, folder, monkeypatch):
    found = judge(f"hf:{folder}")
    went = []
    monkeypatch.setattr(type(found), "to", lambda self, device: went.append(device))
    monkeypatch.setattr(type(found), "successes", lambda self, requests, answers: [True])
    coherent = Coherence(*chat, 100.0)
    attack_success(*chat, REQUESTS[:1], judges=[found], coherent=coherent, max_new_tokens=2)
    assert went == [chat[0].device]
